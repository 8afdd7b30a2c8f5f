/*
 * A dilated clock for one process.
 *
 * This library is loaded with LD_PRELOAD.  It stands in front of the C library
 * and makes time pass RATE times faster (or slower) for its process: clock
 * reads are scaled, and waits are converted so that they end at the same point
 * of the scaled clock.  It is no Python module: there is no PyInit function,
 * and importing it fails.  It only borrows the file name of an extension so
 * that setuptools builds it.
 *
 * The library has a second half, _sends.c, which stands in front of torch's
 * faulty agent.  Neither half calls the other.
 *
 * Words used below:
 *   real time     what the kernel reports;
 *   virtual time  what the process sees;
 *   mapping       the line virtual = vbase + (real - rbase) * rate.
 *
 * There is one time axis, the real CLOCK_MONOTONIC.  Every virtual clock is
 * that axis, mapped, plus a constant offset.  So all virtual clocks agree with
 * each other, and a step of the wall clock cannot be multiplied by the rate.
 * All deadlines become deadlines on the real CLOCK_MONOTONIC wherever the C
 * library has a variant that accepts it.
 *
 * Until the first rpcprops_clock_set_rate() nothing is converted: calls go to
 * the real functions unchanged.
 */
#undef _FORTIFY_SOURCE /* its inline wrappers would clash with ours */
#undef _FILE_OFFSET_BITS
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <aio.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <math.h>
#include <mqueue.h>
#include <netdb.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/times.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#if !defined(__linux__) || !defined(__x86_64__) || !defined(__GLIBC__)
#error "the dilated clock supports Linux on x86-64 with glibc only"
#endif

#define EXPORT __attribute__((visibility("default")))

/* Absent from the headers of older kernels and C libraries. */
#ifndef SYS_epoll_pwait2
#define SYS_epoll_pwait2 441
#endif
#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#ifndef SYS_futex_wait
#define SYS_futex_wait 455
#endif
#ifndef FUTEX_LOCK_PI2
#define FUTEX_LOCK_PI2 13
#endif

#define NS_PER_S INT64_C(1000000000)
#define NS_PER_MS INT64_C(1000000)
#define NS_PER_US INT64_C(1000)
#define NEVER INT64_MAX

/* How close two reads of clocks should be, and how often that is tried. */
#define OFFSET_NS (5 * NS_PER_US)
#define OFFSET_TRIES 20

typedef unsigned __int128 u128;

/* ------------------------------------------------------------------------ */
/* The control interface                                                    */
/* ------------------------------------------------------------------------ */

EXPORT int rpcprops_clock_set_rate(double rate);
EXPORT int rpcprops_clock_set_rate_from(double rate, int64_t origin_ns);
EXPORT double rpcprops_clock_get_rate(void);
EXPORT int64_t rpcprops_clock_real_ns(int clockid);
EXPORT int rpcprops_clock_selfcheck(void);
EXPORT int rpcprops_clock_sleeps_watch(const int64_t *requested_ns, int n);
EXPORT int rpcprops_clock_sleeps_count(int64_t *counts, int n);
EXPORT void rpcprops_clock_lateness(int64_t *max_ns, int64_t *sum_ns, int64_t *n);
EXPORT void rpcprops_clock_lateness_reset(void);
EXPORT void rpcprops_clock_rest(int on);

/* Results of rpcprops_clock_selfcheck(). */
enum {
    CHECK_OK = 0,
    CHECK_SYMBOL_MISSING = 1,   /* a real function was not found */
    CHECK_NOT_INTERPOSED = 2,   /* another library stands in front of this one */
    CHECK_CONDVAR_LAYOUT = 3,   /* the clock of a condition variable is not where expected */
    CHECK_CONDVAR_WAIT = 4,     /* a timed wait on a condition variable ended wrongly */
    CHECK_CLOCK_BACKWARDS = 5,  /* a virtual clock ran backwards */
    CHECK_ARITHMETIC = 6,       /* a deadline was converted to an instant before it */
};

/* ------------------------------------------------------------------------ */
/* The real functions                                                       */
/* ------------------------------------------------------------------------ */

struct timeb; /* <sys/timeb.h> is deprecated */
int ftime(struct timeb *);
int __poll_chk(struct pollfd *, nfds_t, int, size_t);
int __ppoll_chk(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *, size_t);
int __clock_gettime(clockid_t, struct timespec *);
int __gettimeofday(struct timeval *restrict, void *restrict);
int __nanosleep(const struct timespec *, struct timespec *);
int __poll(struct pollfd *, nfds_t, int);
int __select(int, fd_set *restrict, fd_set *restrict, fd_set *restrict, struct timeval *restrict);
int epoll_pwait2(int, struct epoll_event *, int, const struct timespec *, const sigset_t *);

/*
 * Name and symbol version.  dlsym(RTLD_NEXT) picks the oldest version of a
 * symbol, so those whose oldest version is a different function name theirs.
 */
#define REAL_FUNCTIONS(X)                       \
    X(clock_gettime, NULL)                      \
    X(gettimeofday, NULL)                       \
    X(time, NULL)                               \
    X(timespec_get, NULL)                       \
    X(times, NULL)                              \
    X(sysinfo, NULL)                            \
    X(clock_settime, NULL)                      \
    X(settimeofday, NULL)                       \
    X(nanosleep, NULL)                          \
    X(clock_nanosleep, NULL)                    \
    X(usleep, NULL)                             \
    X(sleep, NULL)                              \
    X(thrd_sleep, NULL)                         \
    X(poll, NULL)                               \
    X(ppoll, NULL)                              \
    X(__poll_chk, NULL)                         \
    X(__ppoll_chk, NULL)                        \
    X(select, NULL)                             \
    X(pselect, NULL)                            \
    X(epoll_wait, NULL)                         \
    X(epoll_pwait, NULL)                        \
    X(epoll_pwait2, NULL)                       \
    X(pthread_cond_wait, "GLIBC_2.3.2")         \
    X(pthread_cond_timedwait, "GLIBC_2.3.2")    \
    X(pthread_cond_clockwait, NULL)             \
    X(pthread_mutex_timedlock, NULL)            \
    X(pthread_mutex_clocklock, NULL)            \
    X(pthread_rwlock_timedrdlock, NULL)         \
    X(pthread_rwlock_timedwrlock, NULL)         \
    X(pthread_rwlock_clockrdlock, NULL)         \
    X(pthread_rwlock_clockwrlock, NULL)         \
    X(pthread_timedjoin_np, NULL)               \
    X(pthread_clockjoin_np, NULL)               \
    X(sem_timedwait, NULL)                      \
    X(sem_clockwait, NULL)                      \
    X(cnd_timedwait, NULL)                      \
    X(mtx_timedlock, NULL)                      \
    X(sigtimedwait, NULL)                       \
    X(mq_timedsend, NULL)                       \
    X(mq_timedreceive, NULL)                    \
    X(semtimedop, NULL)                         \
    X(recvmmsg, NULL)                           \
    X(aio_suspend, NULL)                        \
    X(gai_suspend, NULL)                        \
    X(timerfd_settime, NULL)                    \
    X(timerfd_gettime, NULL)                    \
    X(setitimer, NULL)                          \
    X(getitimer, NULL)                          \
    X(alarm, NULL)                              \
    X(ualarm, NULL)                             \
    X(timer_create, "GLIBC_2.3.3")              \
    X(timer_delete, "GLIBC_2.3.3")              \
    X(timer_settime, "GLIBC_2.3.3")             \
    X(timer_gettime, "GLIBC_2.3.3")             \
    X(setsockopt, NULL)                         \
    X(getsockopt, NULL)                         \
    X(execve, NULL)                             \
    X(execvpe, NULL)                            \
    X(execveat, NULL)                           \
    X(fexecve, NULL)                            \
    X(posix_spawn, "GLIBC_2.15")                \
    X(posix_spawnp, "GLIBC_2.15")               \
    X(syscall, NULL)

#define DECLARE(name, version) __typeof__(&name) name;
static struct {
    REAL_FUNCTIONS(DECLARE)
} real;
#undef DECLARE

static const struct {
    const char *name;
    const char *version;
    void **slot;
} real_functions[] = {
#define ROW(name, version) {#name, version, (void **)&real.name},
    REAL_FUNCTIONS(ROW)
#undef ROW
};

#define REAL_FUNCTION_COUNT ((int)(sizeof real_functions / sizeof real_functions[0]))

/*
 * Another library's constructor may call us before ours has run, so every
 * wrapper asks for its real function through here.  Looking up twice is
 * harmless: both writers store the same pointer.
 */
static void resolve_real_functions(void)
{
    for (int i = 0; i < REAL_FUNCTION_COUNT; i++) {
        void *found = NULL;
        if (real_functions[i].version)
            found = dlvsym(RTLD_NEXT, real_functions[i].name, real_functions[i].version);
        if (!found)
            found = dlsym(RTLD_NEXT, real_functions[i].name);
        __atomic_store_n(real_functions[i].slot, found, __ATOMIC_RELEASE);
    }
}

static void *resolved(void **slot)
{
    void *found = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
    if (__builtin_expect(!found, 0)) {
        int saved = errno;
        resolve_real_functions();
        found = __atomic_load_n(slot, __ATOMIC_ACQUIRE);
        errno = saved;
    }
    return found;
}

/*
 * The real function, or a return of `missing` with ENOSYS where this C
 * library does not have it.
 */
#define REAL(name) ((__typeof__(&name))resolved((void **)&real.name))
#define REQUIRE(name, missing)      \
    do {                            \
        if (!REAL(name)) {          \
            errno = ENOSYS;         \
            return (missing);       \
        }                           \
    } while (0)

static long kernel(long nr, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* As syscall(): -1 and errno on an error. */
static long kernel_errno(long nr, long a, long b, long c, long d, long e, long f)
{
    long result = kernel(nr, a, b, c, d, e, f);
    if (result < 0 && result > -4096) {
        errno = (int)-result;
        return -1;
    }
    return result;
}

/* Never resolves: the dynamic linker itself may be the caller. */
static int real_clock_gettime(clockid_t id, struct timespec *ts)
{
    __typeof__(&clock_gettime) read = __atomic_load_n(&real.clock_gettime, __ATOMIC_RELAXED);
    if (__builtin_expect(read != NULL, 1))
        return read(id, ts);
    return (int)kernel_errno(SYS_clock_gettime, id, (long)ts, 0, 0, 0, 0);
}

static int64_t real_now(clockid_t id)
{
    struct timespec ts;
    if (real_clock_gettime(id, &ts) != 0)
        return -1;
    return (int64_t)ts.tv_sec * NS_PER_S + ts.tv_nsec;
}

/* ------------------------------------------------------------------------ */
/* Saturating arithmetic on nanoseconds                                     */
/* ------------------------------------------------------------------------ */

static int64_t add(int64_t a, int64_t b)
{
    int64_t sum;
    if (__builtin_add_overflow(a, b, &sum))
        return b > 0 ? INT64_MAX : INT64_MIN;
    return sum;
}

static int64_t from_u128(u128 value)
{
    return value > (u128)INT64_MAX ? INT64_MAX : (int64_t)value;
}

static bool timespec_valid(const struct timespec *ts)
{
    return ts->tv_sec >= 0 && ts->tv_nsec >= 0 && ts->tv_nsec < NS_PER_S;
}

static int64_t timespec_ns(const struct timespec *ts)
{
    if (ts->tv_sec >= INT64_MAX / NS_PER_S)
        return NEVER;
    return (int64_t)ts->tv_sec * NS_PER_S + ts->tv_nsec;
}

static struct timespec ns_timespec(int64_t ns)
{
    return (struct timespec){.tv_sec = ns / NS_PER_S, .tv_nsec = ns % NS_PER_S};
}

static int64_t timeval_ns(const struct timeval *tv)
{
    if (tv->tv_sec >= INT64_MAX / NS_PER_S)
        return NEVER;
    return (int64_t)tv->tv_sec * NS_PER_S + (int64_t)tv->tv_usec * NS_PER_US;
}

/* Rounds up: a timer must not fire early, and a short one must not become 0,
   which would disarm it. */
static struct timeval ns_timeval_up(int64_t ns)
{
    int64_t us = ns / NS_PER_US + (ns % NS_PER_US != 0);
    return (struct timeval){.tv_sec = us / 1000000, .tv_usec = us % 1000000};
}

/* ------------------------------------------------------------------------ */
/* The mapping between real and virtual time                                */
/* ------------------------------------------------------------------------ */

/*
 * The rate is a fixed-point number with 44 fraction bits: 20 bits are left for
 * its whole part, so rates up to 2^20 fit, and whole rates are exact.  A double
 * product would lose single nanoseconds after 2^53 ns, 104 days.
 */
#define FRACTION_BITS 44
#define RATE_ONE ((double)(UINT64_C(1) << FRACTION_BITS))
#define RATE_MIN 1e-6
#define RATE_MAX 1e6

enum family { REALTIME, MONOTONIC, RAW, BOOTTIME, TAI, FAMILIES, NOT_SCALED = -1 };

static const clockid_t family_clock[FAMILIES] = {
    CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_BOOTTIME, CLOCK_TAI,
};

/* A coarse clock lags by up to a tick, which the rate would multiply, so
   coarse clocks are read as finely as the others. */
static inline enum family family_of(clockid_t id)
{
    static const signed char table[] = {
        [CLOCK_REALTIME] = REALTIME,
        [CLOCK_MONOTONIC] = MONOTONIC,
        [CLOCK_PROCESS_CPUTIME_ID] = NOT_SCALED,
        [CLOCK_THREAD_CPUTIME_ID] = NOT_SCALED,
        [CLOCK_MONOTONIC_RAW] = RAW,
        [CLOCK_REALTIME_COARSE] = REALTIME,
        [CLOCK_MONOTONIC_COARSE] = MONOTONIC,
        [CLOCK_BOOTTIME] = BOOTTIME,
        [CLOCK_REALTIME_ALARM] = REALTIME,
        [CLOCK_BOOTTIME_ALARM] = BOOTTIME,
        [10] = NOT_SCALED, /* CLOCK_SGI_CYCLE, removed from Linux */
        [CLOCK_TAI] = TAI,
    };
    if ((unsigned)id >= sizeof table)
        return NOT_SCALED;
    return (enum family)table[id];
}

struct mapping {
    uint64_t rate;            /* fixed point */
    int64_t rbase;            /* real CLOCK_MONOTONIC */
    int64_t vbase;            /* virtual CLOCK_MONOTONIC */
    int64_t offset[FAMILIES]; /* virtual clock minus virtual CLOCK_MONOTONIC */
    int64_t slack;            /* timer slack at rate 1 */
};

#define MAPPING_WORDS (sizeof(struct mapping) / sizeof(uint64_t))

/*
 * A sequence lock.  0: never set.  Odd: being changed.  The words are atomic
 * only so that a read that races with a change is defined; it is then thrown
 * away.
 */
static struct {
    atomic_uint sequence;
    atomic_flag writer;
    _Atomic uint64_t words[MAPPING_WORDS];
    _Atomic double rate;
} state = {.writer = ATOMIC_FLAG_INIT};

static atomic_bool started;
static void inherit_state(void);

static unsigned sequence_begin(void)
{
    unsigned sequence = atomic_load_explicit(&state.sequence, memory_order_acquire);
    if (__builtin_expect(sequence == 0, 0) &&
        !atomic_load_explicit(&started, memory_order_relaxed)) {
        /* The constructor of another library runs before ours. */
        inherit_state();
        sequence = atomic_load_explicit(&state.sequence, memory_order_acquire);
    }
    for (int spins = 0; __builtin_expect(sequence & 1, 0); spins++) {
        if (spins > 100)
            kernel(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
        sequence = atomic_load_explicit(&state.sequence, memory_order_acquire);
    }
    return sequence;
}

static bool sequence_changed(unsigned sequence)
{
    atomic_thread_fence(memory_order_acquire);
    return atomic_load_explicit(&state.sequence, memory_order_relaxed) != sequence;
}

static uint64_t word(size_t index)
{
    return atomic_load_explicit(&state.words[index], memory_order_relaxed);
}

#define WORD(field) word(offsetof(struct mapping, field) / sizeof(uint64_t))

/* False while no rate was set. */
static bool mapping_get(struct mapping *mapping)
{
    unsigned sequence;
    do {
        uint64_t copy[MAPPING_WORDS];
        sequence = sequence_begin();
        if (sequence == 0)
            return false;
        for (size_t i = 0; i < MAPPING_WORDS; i++)
            copy[i] = word(i);
        memcpy(mapping, copy, sizeof copy);
    } while (sequence_changed(sequence));
    return true;
}

static inline int64_t scale(uint64_t rate, int64_t real_ns)
{
    u128 product = (u128)(uint64_t)real_ns * rate;
    if (__builtin_expect((uint64_t)(product >> 64) >> (FRACTION_BITS - 1), 0))
        return INT64_MAX;
    return (int64_t)(product >> FRACTION_BITS);
}

static inline int64_t virtual_at(uint64_t rate, int64_t rbase, int64_t base, int64_t real_ns)
{
    int64_t elapsed = real_ns - rbase;
    return add(base, scale(rate, elapsed < 0 ? 0 : elapsed));
}

/* The smallest real length that is at least the virtual one once scaled. */
static int64_t real_length(const struct mapping *m, int64_t virtual_ns)
{
    if (virtual_ns == NEVER)
        return NEVER;
    u128 shifted = (u128)(uint64_t)virtual_ns << FRACTION_BITS;
    return from_u128((shifted + m->rate - 1) / m->rate);
}

/* Rounds up: a caller that waits for the rest must not end early. */
static int64_t virtual_length(const struct mapping *m, int64_t real_ns)
{
    u128 product = (u128)(uint64_t)real_ns * m->rate;
    return from_u128((product + (((u128)1 << FRACTION_BITS) - 1)) >> FRACTION_BITS);
}

/* The first real instant at which the virtual clock has reached `virtual_ns`.
   Anything before the last change of rate is past, and stays past. */
static int64_t real_deadline(const struct mapping *m, enum family family, int64_t virtual_ns)
{
    if (virtual_ns == NEVER)
        return NEVER;
    int64_t since = add(add(virtual_ns, -m->offset[family]), -m->vbase);
    if (since <= 0)
        return m->rbase;
    return add(m->rbase, real_length(m, since));
}

/* False while no rate was set.  The clock is read inside the sequence lock:
   a reading taken across a change of rate could run ahead of the new line. */
static inline bool virtual_now(enum family family, int64_t *now)
{
    for (;;) {
        unsigned sequence = sequence_begin();
        if (sequence == 0)
            return false;
        uint64_t rate = WORD(rate);
        int64_t rbase = (int64_t)WORD(rbase);
        int64_t base = (int64_t)WORD(vbase) + (int64_t)word(
            offsetof(struct mapping, offset) / sizeof(uint64_t) + (size_t)family);
        int64_t now_real = real_now(CLOCK_MONOTONIC);
        if (__builtin_expect(!sequence_changed(sequence), 1)) {
            *now = virtual_at(rate, rbase, base, now_real);
            return true;
        }
    }
}

/* ------------------------------------------------------------------------ */
/* How late timed waits return                                              */
/* ------------------------------------------------------------------------ */

static struct {
    _Atomic int64_t max;
    _Atomic int64_t sum;
    _Atomic int64_t n;
} lateness;

/* One wait under way, in real CLOCK_MONOTONIC nanoseconds. */
struct wait {
    struct mapping m;
    int64_t start;
    int64_t deadline;
};

/* Only for a wait that timed out.  One whose deadline was past when it began
   waited for nothing and says nothing about the scheduler.  Leaves errno. */
static void note_timeout(const struct wait *w)
{
    if (w->deadline <= w->start)
        return;
    int64_t late = real_now(CLOCK_MONOTONIC) - w->deadline;
    if (late < 0)
        late = 0;
    int64_t max = atomic_load_explicit(&lateness.max, memory_order_relaxed);
    while (late > max && !atomic_compare_exchange_weak_explicit(
               &lateness.max, &max, late, memory_order_relaxed, memory_order_relaxed))
        ;
    atomic_fetch_add_explicit(&lateness.sum, late, memory_order_relaxed);
    atomic_fetch_add_explicit(&lateness.n, 1, memory_order_relaxed);
}

void rpcprops_clock_lateness(int64_t *max_ns, int64_t *sum_ns, int64_t *n)
{
    *max_ns = atomic_load_explicit(&lateness.max, memory_order_relaxed);
    *sum_ns = atomic_load_explicit(&lateness.sum, memory_order_relaxed);
    *n = atomic_load_explicit(&lateness.n, memory_order_relaxed);
}

void rpcprops_clock_lateness_reset(void)
{
    atomic_store_explicit(&lateness.max, 0, memory_order_relaxed);
    atomic_store_explicit(&lateness.sum, 0, memory_order_relaxed);
    atomic_store_explicit(&lateness.n, 0, memory_order_relaxed);
}

/* ------------------------------------------------------------------------ */
/* Converting timeouts and deadlines                                        */
/* ------------------------------------------------------------------------ */

/*
 * Each returns false when the caller's own value has to go to the real
 * function as it is: no rate was set, or the value is zero, infinite (NULL) or
 * invalid, so that the real function gives its own answer.
 */
static bool relative_ns(int64_t virtual_ns, int64_t *length, struct wait *w)
{
    if (virtual_ns <= 0 || !mapping_get(&w->m))
        return false;
    *length = real_length(&w->m, virtual_ns);
    w->start = real_now(CLOCK_MONOTONIC);
    w->deadline = add(w->start, *length);
    return true;
}

static bool relative(const struct timespec *timeout, struct timespec *length, struct wait *w)
{
    int64_t ns;
    if (!timeout || !timespec_valid(timeout) || !relative_ns(timespec_ns(timeout), &ns, w))
        return false;
    *length = ns_timespec(ns);
    return true;
}

static bool absolute(clockid_t id, const struct timespec *deadline, struct timespec *monotonic,
                     struct wait *w)
{
    enum family family = family_of(id);
    if (family == NOT_SCALED || !deadline || !timespec_valid(deadline) || !mapping_get(&w->m))
        return false;
    w->deadline = real_deadline(&w->m, family, timespec_ns(deadline));
    w->start = real_now(CLOCK_MONOTONIC);
    *monotonic = ns_timespec(w->deadline);
    return true;
}

/* For calls that cannot wait on CLOCK_MONOTONIC.  The other clock is read
   second, so the result can only be late. */
static struct timespec on_clock(clockid_t id, int64_t monotonic)
{
    if (id == CLOCK_MONOTONIC || monotonic == NEVER)
        return ns_timespec(monotonic);
    int64_t left = add(monotonic, -real_now(CLOCK_MONOTONIC));
    int64_t there = add(real_now(id), left);
    return ns_timespec(there < 1 ? 1 : there);
}

/* What is left of a wait now, in virtual nanoseconds, at most `requested`. */
static int64_t left_of(const struct wait *w, int64_t requested)
{
    int64_t left = add(w->deadline, -real_now(CLOCK_MONOTONIC));
    if (left <= 0)
        return 0;
    left = virtual_length(&w->m, left);
    return left < requested ? left : requested;
}

static void scale_back(const struct wait *w, struct timespec *ts)
{
    *ts = ns_timespec(virtual_length(&w->m, timespec_ns(ts)));
}

/* ------------------------------------------------------------------------ */
/* Clock reads                                                              */
/* ------------------------------------------------------------------------ */

EXPORT int clock_gettime(clockid_t id, struct timespec *ts)
{
    enum family family = family_of(id);
    if (family == NOT_SCALED)
        return real_clock_gettime(id, ts);
    int64_t now;
    while (!virtual_now(family, &now)) {
        int result = real_clock_gettime(id, ts);
        if (!sequence_changed(0))
            return result;
    }
    *ts = ns_timespec((int64_t)(uint64_t)now);
    return 0;
}

/* Names with underscores below: aliases that the C library exports too. */
EXPORT int __clock_gettime(clockid_t id, struct timespec *ts)
{
    return clock_gettime(id, ts);
}

EXPORT int gettimeofday(struct timeval *restrict tv, void *restrict tz)
{
    if (tz && REAL(gettimeofday))
        REAL(gettimeofday)(tv, tz);
    struct timespec now;
    int result = clock_gettime(CLOCK_REALTIME, &now);
    *tv = (struct timeval){.tv_sec = now.tv_sec, .tv_usec = now.tv_nsec / NS_PER_US};
    return result;
}

EXPORT int __gettimeofday(struct timeval *restrict tv, void *restrict tz)
{
    return gettimeofday(tv, tz);
}

EXPORT time_t time(time_t *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out)
        *out = now.tv_sec;
    return now.tv_sec;
}

EXPORT int timespec_get(struct timespec *ts, int base)
{
    enum { C23_TIME_MONOTONIC = 2 };
    REQUIRE(timespec_get, 0);
    int result = REAL(timespec_get)(ts, base);
    if (result == TIME_UTC)
        clock_gettime(CLOCK_REALTIME, ts);
    else if (result == C23_TIME_MONOTONIC)
        clock_gettime(CLOCK_MONOTONIC, ts);
    return result;
}

struct timeb {
    time_t time;
    unsigned short millitm;
    short timezone;
    short dstflag;
};

EXPORT int ftime(struct timeb *out)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    *out = (struct timeb){.time = now.tv_sec,
                          .millitm = (unsigned short)(now.tv_nsec / NS_PER_MS)};
    return 0;
}

/* The zero of this clock is arbitrary, so it keeps the kernel's. */
EXPORT clock_t times(struct tms *buffer)
{
    int64_t now;
    REQUIRE(times, (clock_t)-1);
    clock_t ticks = REAL(times)(buffer);
    if (!virtual_now(MONOTONIC, &now))
        return ticks;
    return ticks + (now - real_now(CLOCK_MONOTONIC)) / (NS_PER_S / sysconf(_SC_CLK_TCK));
}

EXPORT int sysinfo(struct sysinfo *info)
{
    int64_t now;
    REQUIRE(sysinfo, -1);
    int result = REAL(sysinfo)(info);
    if (result == 0 && virtual_now(BOOTTIME, &now))
        info->uptime = now / NS_PER_S + (now % NS_PER_S != 0); /* the kernel rounds up too */
    return result;
}

/* A dilated process has no business setting the machine's clock: it would set
   it to its own time. */
static bool refuse_to_set(void)
{
    struct mapping m;
    if (!mapping_get(&m))
        return false;
    errno = EPERM;
    return true;
}

EXPORT int clock_settime(clockid_t id, const struct timespec *ts)
{
    REQUIRE(clock_settime, -1);
    return refuse_to_set() ? -1 : REAL(clock_settime)(id, ts);
}

EXPORT int settimeofday(const struct timeval *tv, const struct timezone *tz)
{
    REQUIRE(settimeofday, -1);
    return refuse_to_set() ? -1 : REAL(settimeofday)(tv, tz);
}

/* ------------------------------------------------------------------------ */
/* The register of sleeps                                                   */
/* ------------------------------------------------------------------------ */

enum { WATCHED_MAX = 64 };

static struct {
    atomic_int n;
    _Atomic int64_t requested[WATCHED_MAX];
    _Atomic int64_t count[WATCHED_MAX];
} watched;

static void count_sleep(const struct timespec *requested)
{
    int n = atomic_load_explicit(&watched.n, memory_order_acquire);
    if (n == 0 || !requested || !timespec_valid(requested))
        return;
    int64_t ns = timespec_ns(requested);
    for (int i = 0; i < n; i++)
        if (atomic_load_explicit(&watched.requested[i], memory_order_relaxed) == ns)
            atomic_fetch_add_explicit(&watched.count[i], 1, memory_order_relaxed);
}

int rpcprops_clock_sleeps_watch(const int64_t *requested_ns, int n)
{
    if (n < 0 || n > WATCHED_MAX || (n > 0 && !requested_ns)) {
        errno = EINVAL;
        return -1;
    }
    atomic_store_explicit(&watched.n, 0, memory_order_release);
    for (int i = 0; i < n; i++) {
        atomic_store_explicit(&watched.requested[i], requested_ns[i], memory_order_relaxed);
        atomic_store_explicit(&watched.count[i], 0, memory_order_relaxed);
    }
    atomic_store_explicit(&watched.n, n, memory_order_release);
    return 0;
}

/* Returns the number of watched lengths; writes at most `n` of the counts. */
int rpcprops_clock_sleeps_count(int64_t *counts, int n)
{
    int have = atomic_load_explicit(&watched.n, memory_order_acquire);
    for (int i = 0; i < have && i < n; i++)
        counts[i] = atomic_load_explicit(&watched.count[i], memory_order_relaxed);
    return have;
}

/* ------------------------------------------------------------------------ */
/* Sleeps                                                                   */
/* ------------------------------------------------------------------------ */

static int sleep_relative(const struct timespec *requested, struct timespec *left)
{
    struct timespec length;
    struct wait w;
    REQUIRE(nanosleep, -1);
    if (!relative(requested, &length, &w))
        return REAL(nanosleep)(requested, left);
    struct timespec rest;
    int64_t asked = timespec_ns(requested);
    int result = REAL(nanosleep)(&length, &rest);
    if (result == 0)
        note_timeout(&w);
    else if (errno == EINTR && left) {
        scale_back(&w, &rest);
        int64_t ns = timespec_ns(&rest);
        *left = ns_timespec(ns < asked ? ns : asked);
    }
    return result;
}

EXPORT int nanosleep(const struct timespec *requested, struct timespec *left)
{
    count_sleep(requested);
    return sleep_relative(requested, left);
}

EXPORT int __nanosleep(const struct timespec *requested, struct timespec *left)
{
    return nanosleep(requested, left);
}

EXPORT int clock_nanosleep(clockid_t id, int flags, const struct timespec *requested,
                           struct timespec *left)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(clock_nanosleep, ENOSYS);
    __typeof__(&clock_nanosleep) sleeper = REAL(clock_nanosleep);
    if (family_of(id) == NOT_SCALED)
        return sleeper(id, flags, requested, left);
    int result;
    if (flags & TIMER_ABSTIME) {
        if (!absolute(id, requested, &ts, &w))
            return sleeper(id, flags, requested, left);
        if (id == CLOCK_REALTIME || id == CLOCK_BOOTTIME || id == CLOCK_TAI)
            id = CLOCK_MONOTONIC;
        ts = on_clock(id, w.deadline);
        result = sleeper(id, flags, &ts, left);
    } else {
        if (!relative(requested, &ts, &w))
            return sleeper(id, flags, requested, left);
        int64_t asked = timespec_ns(requested);
        result = sleeper(id, flags, &ts, left);
        if (result == EINTR && left) {
            scale_back(&w, left);
            if (timespec_ns(left) > asked)
                *left = ns_timespec(asked);
        }
    }
    if (result == 0)
        note_timeout(&w);
    return result;
}

EXPORT int usleep(useconds_t us)
{
    struct timespec requested = ns_timespec((int64_t)us * NS_PER_US);
    return sleep_relative(&requested, NULL);
}

EXPORT unsigned sleep(unsigned seconds)
{
    int saved = errno;
    struct timespec left = {.tv_sec = seconds};
    if (sleep_relative(&left, &left) != 0)
        return (unsigned)left.tv_sec;
    errno = saved;
    return 0;
}

EXPORT int thrd_sleep(const struct timespec *requested, struct timespec *left)
{
    if (sleep_relative(requested, left) == 0)
        return 0;
    return errno == EINTR ? -1 : -2;
}

/* ------------------------------------------------------------------------ */
/* Yields                                                                   */
/* ------------------------------------------------------------------------ */

/*
 * A thread that looks for work and yields, again and again, takes a processor
 * from those that have work.  TensorPipe's threads for shared memory do that
 * (tensorpipe/common/busy_polling_loop.h), one in each rank.  While the clock
 * runs fast, what the other threads lose counts RATE times.  So a thread that
 * has yielded for a while, with nothing to do in between, sleeps for a short
 * real time instead.  sched_yield() promises nothing about when it returns.
 *
 * While a process rests, because nobody will send it anything, such a thread
 * sleeps until the rest ends, and looks for work every REST_NS.
 */
enum {
    YIELDS_BEFORE_SLEEP_NS = 300000,
    YIELD_SLEEP_NS = 100000,
    /* A shorter time between two yields is no work. */
    YIELD_NO_WORK_NS = 5000,
    REST_NS = 100000000,
};

static _Thread_local int64_t last_yield;
static _Thread_local int64_t idle_since;
static atomic_int rests;

void rpcprops_clock_rest(int on)
{
    atomic_store(&rests, on != 0);
    if (!on)
        kernel(SYS_futex, (long)&rests, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, INT_MAX, 0, 0, 0);
}

EXPORT int sched_yield(void)
{
    long result = 0;
    if (atomic_load_explicit(&rests, memory_order_relaxed)) {
        struct timespec length = ns_timespec(REST_NS);
        kernel(SYS_futex, (long)&rests, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, 1, (long)&length, 0, 0);
    } else if (atomic_load_explicit(&state.rate, memory_order_relaxed) <= 1) {
        result = kernel(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
    } else {
        int64_t now = real_now(CLOCK_MONOTONIC);
        if (now - last_yield > YIELD_NO_WORK_NS)
            idle_since = now;
        if (now - idle_since < YIELDS_BEFORE_SLEEP_NS) {
            result = kernel(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
        } else {
            struct timespec length = ns_timespec(YIELD_SLEEP_NS);
            kernel(SYS_nanosleep, (long)&length, 0, 0, 0, 0, 0);
        }
        last_yield = real_now(CLOCK_MONOTONIC);
    }
    return result < 0 ? -1 : 0;
}

/* ------------------------------------------------------------------------ */
/* Waits for file descriptors                                               */
/* ------------------------------------------------------------------------ */

/* False as for relative(). */
static bool relative_ms(int timeout_ms, struct timespec *length, struct wait *w)
{
    int64_t ns;
    if (!relative_ns((int64_t)timeout_ms * NS_PER_MS, &ns, w))
        return false;
    *length = ns_timespec(ns);
    return true;
}

EXPORT int poll(struct pollfd *fds, nfds_t n, int timeout_ms)
{
    struct timespec length;
    struct wait w;
    REQUIRE(poll, -1);
    REQUIRE(ppoll, -1);
    if (!relative_ms(timeout_ms, &length, &w))
        return REAL(poll)(fds, n, timeout_ms);
    int result = REAL(ppoll)(fds, n, &length, NULL);
    if (result == 0)
        note_timeout(&w);
    return result;
}

EXPORT int __poll(struct pollfd *fds, nfds_t n, int timeout_ms)
{
    return poll(fds, n, timeout_ms);
}

EXPORT int ppoll(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
                 const sigset_t *mask)
{
    struct timespec length;
    struct wait w;
    REQUIRE(ppoll, -1);
    if (!relative(timeout, &length, &w))
        return REAL(ppoll)(fds, n, timeout, mask);
    int result = REAL(ppoll)(fds, n, &length, mask);
    if (result == 0)
        note_timeout(&w);
    return result;
}

/* The fortified variants: the real ones report the overflow and abort. */
EXPORT int __poll_chk(struct pollfd *fds, nfds_t n, int timeout_ms, size_t size)
{
    if (size / sizeof *fds < n && REAL(__poll_chk))
        return REAL(__poll_chk)(fds, n, timeout_ms, size);
    return poll(fds, n, timeout_ms);
}

EXPORT int __ppoll_chk(struct pollfd *fds, nfds_t n, const struct timespec *timeout,
                       const sigset_t *mask, size_t size)
{
    if (size / sizeof *fds < n && REAL(__ppoll_chk))
        return REAL(__ppoll_chk)(fds, n, timeout, mask, size);
    return ppoll(fds, n, timeout, mask);
}

/* Waits with pselect(), which counts nanoseconds, and writes the remaining
   time back as Linux does. */
EXPORT int select(int n, fd_set *restrict readable, fd_set *restrict writable,
                  fd_set *restrict exceptional, struct timeval *restrict timeout)
{
    int64_t ns;
    struct wait w;
    REQUIRE(select, -1);
    REQUIRE(pselect, -1);
    if (!timeout || timeout->tv_sec < 0 || timeout->tv_usec < 0)
        return REAL(select)(n, readable, writable, exceptional, timeout);
    /* More than a million microseconds are valid here. */
    struct timeval asked = {.tv_sec = add(timeout->tv_sec, timeout->tv_usec / 1000000),
                            .tv_usec = timeout->tv_usec % 1000000};
    int64_t requested = timeval_ns(&asked);
    if (!relative_ns(requested, &ns, &w))
        return REAL(select)(n, readable, writable, exceptional, timeout);
    struct timespec length = ns_timespec(ns);
    int result = REAL(pselect)(n, readable, writable, exceptional, &length, NULL);
    if (result == 0)
        note_timeout(&w);
    int64_t left = result == 0 ? 0 : left_of(&w, requested);
    *timeout = (struct timeval){.tv_sec = left / NS_PER_S,
                                .tv_usec = left % NS_PER_S / NS_PER_US};
    return result;
}

EXPORT int __select(int n, fd_set *restrict readable, fd_set *restrict writable,
                    fd_set *restrict exceptional, struct timeval *restrict timeout)
{
    return select(n, readable, writable, exceptional, timeout);
}

EXPORT int pselect(int n, fd_set *restrict readable, fd_set *restrict writable,
                   fd_set *restrict exceptional, const struct timespec *restrict timeout,
                   const sigset_t *restrict mask)
{
    struct timespec length;
    struct wait w;
    REQUIRE(pselect, -1);
    if (!relative(timeout, &length, &w))
        return REAL(pselect)(n, readable, writable, exceptional, timeout, mask);
    int result = REAL(pselect)(n, readable, writable, exceptional, &length, mask);
    if (result == 0)
        note_timeout(&w);
    return result;
}

/*
 * epoll_pwait2() waits with nanoseconds.  Where the C library or the kernel
 * lacks it, whole milliseconds rounded up never end a wait early and never
 * turn a short one into a busy poll.
 */
static int epoll_for(int epfd, struct epoll_event *events, int n, const struct timespec *length,
                     const sigset_t *mask)
{
    static atomic_bool lacking;
    if (!atomic_load_explicit(&lacking, memory_order_relaxed)) {
        int result;
        if (REAL(epoll_pwait2))
            result = REAL(epoll_pwait2)(epfd, events, n, length, mask);
        else
            result = (int)kernel_errno(SYS_epoll_pwait2, epfd, (long)events, n, (long)length,
                                       (long)mask, sizeof(uint64_t));
        if (result >= 0 || errno != ENOSYS)
            return result;
        atomic_store_explicit(&lacking, true, memory_order_relaxed);
    }
    int64_t ns = timespec_ns(length);
    int64_t ms = ns / NS_PER_MS + (ns % NS_PER_MS != 0);
    return REAL(epoll_pwait)(epfd, events, n, ms > INT_MAX ? INT_MAX : (int)ms, mask);
}

EXPORT int epoll_pwait(int epfd, struct epoll_event *events, int n, int timeout_ms,
                       const sigset_t *mask)
{
    struct timespec length;
    struct wait w;
    REQUIRE(epoll_pwait, -1);
    if (!relative_ms(timeout_ms, &length, &w))
        return REAL(epoll_pwait)(epfd, events, n, timeout_ms, mask);
    int result = epoll_for(epfd, events, n, &length, mask);
    if (result == 0)
        note_timeout(&w);
    return result;
}

EXPORT int epoll_wait(int epfd, struct epoll_event *events, int n, int timeout_ms)
{
    return epoll_pwait(epfd, events, n, timeout_ms, NULL);
}

EXPORT int epoll_pwait2(int epfd, struct epoll_event *events, int n,
                        const struct timespec *timeout, const sigset_t *mask)
{
    struct timespec length;
    struct wait w;
    REQUIRE(epoll_pwait2, -1);
    if (!relative(timeout, &length, &w))
        return REAL(epoll_pwait2)(epfd, events, n, timeout, mask);
    int result = REAL(epoll_pwait2)(epfd, events, n, &length, mask);
    if (result == 0)
        note_timeout(&w);
    return result;
}

/* ------------------------------------------------------------------------ */
/* Condition variables, locks, semaphores, joins                            */
/* ------------------------------------------------------------------------ */

/* glibc keeps the clock of a condition variable in one bit of __wrefs.  The
   self check proves that before a rate can be set. */
enum { CONDVAR_CLOCK_MONOTONIC = 2 };

static clockid_t condvar_clock(pthread_cond_t *cond)
{
    unsigned flags = __atomic_load_n(&cond->__data.__wrefs, __ATOMIC_RELAXED);
    return flags & CONDVAR_CLOCK_MONOTONIC ? CLOCK_MONOTONIC : CLOCK_REALTIME;
}

static bool posix_wait_clock(clockid_t id)
{
    return id == CLOCK_REALTIME || id == CLOCK_MONOTONIC;
}

/* For the calls that return their error. */
static int note_result(int result, const struct wait *w)
{
    if (result == ETIMEDOUT)
        note_timeout(w);
    return result;
}

/*
 * A wait on a condition variable may end without a notification (POSIX calls
 * that a spurious wakeup), so whoever waits looks at its condition again.  An
 * agent of torch that shuts down can miss a notification (docs/findings.md),
 * and then waits for ever.  So where time runs faster, a wait ends after
 * LAPSE_NS, and its thread waits again.  In real time none does.
 */
enum { LAPSE_NS = 1000000000 };

/* Whether a wait of that real length is to end early, and when. */
static bool lapses(const struct mapping *m, int64_t start, int64_t length, struct timespec *end)
{
    if (m->rate <= (uint64_t)1 << FRACTION_BITS || length <= LAPSE_NS ||
        atomic_load_explicit(&rests, memory_order_relaxed))
        return false;
    *end = ns_timespec(start + LAPSE_NS);
    return true;
}

/* Waits until `end`; a wait that has lapsed has been woken, it seems. */
static int wait_for_condition(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                              struct timespec *end, const struct wait *w)
{
    bool early = lapses(&w->m, w->start, add(w->deadline, -w->start), end);
    int result = REAL(pthread_cond_clockwait)(cond, mutex, CLOCK_MONOTONIC, end);
    if (early)
        return result == ETIMEDOUT ? 0 : result;
    return note_result(result, w);
}

EXPORT int pthread_cond_wait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex)
{
    struct timespec end;
    struct mapping m;
    REQUIRE(pthread_cond_wait, ENOSYS);
    REQUIRE(pthread_cond_clockwait, ENOSYS);
    if (!mapping_get(&m) || !lapses(&m, real_now(CLOCK_MONOTONIC), NEVER, &end))
        return REAL(pthread_cond_wait)(cond, mutex);
    int result = REAL(pthread_cond_clockwait)(cond, mutex, CLOCK_MONOTONIC, &end);
    return result == ETIMEDOUT ? 0 : result;
}

EXPORT int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                                  const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_cond_timedwait, ENOSYS);
    REQUIRE(pthread_cond_clockwait, ENOSYS);
    if (!absolute(condvar_clock(cond), deadline, &ts, &w))
        return REAL(pthread_cond_timedwait)(cond, mutex, deadline);
    return wait_for_condition(cond, mutex, &ts, &w);
}

EXPORT int pthread_cond_clockwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                                  clockid_t id, const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_cond_clockwait, ENOSYS);
    if (!posix_wait_clock(id) || !absolute(id, deadline, &ts, &w))
        return REAL(pthread_cond_clockwait)(cond, mutex, id, deadline);
    return wait_for_condition(cond, mutex, &ts, &w);
}

/* A priority inheriting mutex may refuse CLOCK_MONOTONIC, so locks wait on the
   clock that the caller named. */
EXPORT int pthread_mutex_timedlock(pthread_mutex_t *restrict mutex,
                                   const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_mutex_timedlock, ENOSYS);
    if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
        return REAL(pthread_mutex_timedlock)(mutex, deadline);
    ts = on_clock(CLOCK_REALTIME, w.deadline);
    return note_result(REAL(pthread_mutex_timedlock)(mutex, &ts), &w);
}

EXPORT int pthread_mutex_clocklock(pthread_mutex_t *restrict mutex, clockid_t id,
                                   const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_mutex_clocklock, ENOSYS);
    if (!posix_wait_clock(id) || !absolute(id, deadline, &ts, &w))
        return REAL(pthread_mutex_clocklock)(mutex, id, deadline);
    ts = on_clock(id, w.deadline);
    return note_result(REAL(pthread_mutex_clocklock)(mutex, id, &ts), &w);
}

EXPORT int pthread_rwlock_timedrdlock(pthread_rwlock_t *restrict lock,
                                      const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_rwlock_timedrdlock, ENOSYS);
    REQUIRE(pthread_rwlock_clockrdlock, ENOSYS);
    if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
        return REAL(pthread_rwlock_timedrdlock)(lock, deadline);
    return note_result(REAL(pthread_rwlock_clockrdlock)(lock, CLOCK_MONOTONIC, &ts), &w);
}

EXPORT int pthread_rwlock_timedwrlock(pthread_rwlock_t *restrict lock,
                                      const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_rwlock_timedwrlock, ENOSYS);
    REQUIRE(pthread_rwlock_clockwrlock, ENOSYS);
    if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
        return REAL(pthread_rwlock_timedwrlock)(lock, deadline);
    return note_result(REAL(pthread_rwlock_clockwrlock)(lock, CLOCK_MONOTONIC, &ts), &w);
}

EXPORT int pthread_rwlock_clockrdlock(pthread_rwlock_t *restrict lock, clockid_t id,
                                      const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_rwlock_clockrdlock, ENOSYS);
    if (!posix_wait_clock(id) || !absolute(id, deadline, &ts, &w))
        return REAL(pthread_rwlock_clockrdlock)(lock, id, deadline);
    return note_result(REAL(pthread_rwlock_clockrdlock)(lock, CLOCK_MONOTONIC, &ts), &w);
}

EXPORT int pthread_rwlock_clockwrlock(pthread_rwlock_t *restrict lock, clockid_t id,
                                      const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_rwlock_clockwrlock, ENOSYS);
    if (!posix_wait_clock(id) || !absolute(id, deadline, &ts, &w))
        return REAL(pthread_rwlock_clockwrlock)(lock, id, deadline);
    return note_result(REAL(pthread_rwlock_clockwrlock)(lock, CLOCK_MONOTONIC, &ts), &w);
}

EXPORT int pthread_timedjoin_np(pthread_t thread, void **result, const struct timespec *deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_timedjoin_np, ENOSYS);
    REQUIRE(pthread_clockjoin_np, ENOSYS);
    if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
        return REAL(pthread_timedjoin_np)(thread, result, deadline);
    return note_result(REAL(pthread_clockjoin_np)(thread, result, CLOCK_MONOTONIC, &ts), &w);
}

EXPORT int pthread_clockjoin_np(pthread_t thread, void **result, clockid_t id,
                                const struct timespec *deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(pthread_clockjoin_np, ENOSYS);
    if (!posix_wait_clock(id) || !absolute(id, deadline, &ts, &w))
        return REAL(pthread_clockjoin_np)(thread, result, id, deadline);
    return note_result(REAL(pthread_clockjoin_np)(thread, result, CLOCK_MONOTONIC, &ts), &w);
}

EXPORT int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(sem_timedwait, -1);
    REQUIRE(sem_clockwait, -1);
    if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
        return REAL(sem_timedwait)(sem, deadline);
    int result = REAL(sem_clockwait)(sem, CLOCK_MONOTONIC, &ts);
    if (result != 0)
        note_result(errno, &w);
    return result;
}

EXPORT int sem_clockwait(sem_t *restrict sem, clockid_t id,
                         const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(sem_clockwait, -1);
    if (!posix_wait_clock(id) || !absolute(id, deadline, &ts, &w))
        return REAL(sem_clockwait)(sem, id, deadline);
    int result = REAL(sem_clockwait)(sem, CLOCK_MONOTONIC, &ts);
    if (result != 0)
        note_result(errno, &w);
    return result;
}

/* The C11 calls take TIME_UTC only. */
EXPORT int cnd_timedwait(cnd_t *restrict cond, mtx_t *restrict mutex,
                         const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(cnd_timedwait, thrd_error);
    if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
        return REAL(cnd_timedwait)(cond, mutex, deadline);
    ts = on_clock(CLOCK_REALTIME, w.deadline);
    int result = REAL(cnd_timedwait)(cond, mutex, &ts);
    if (result == thrd_timedout)
        note_timeout(&w);
    return result;
}

EXPORT int mtx_timedlock(mtx_t *restrict mutex, const struct timespec *restrict deadline)
{
    struct timespec ts;
    struct wait w;
    REQUIRE(mtx_timedlock, thrd_error);
    if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
        return REAL(mtx_timedlock)(mutex, deadline);
    ts = on_clock(CLOCK_REALTIME, w.deadline);
    int result = REAL(mtx_timedlock)(mutex, &ts);
    if (result == thrd_timedout)
        note_timeout(&w);
    return result;
}

/* ------------------------------------------------------------------------ */
/* Waits for signals, messages, asynchronous work                           */
/* ------------------------------------------------------------------------ */

EXPORT int sigtimedwait(const sigset_t *restrict set, siginfo_t *restrict info,
                        const struct timespec *restrict timeout)
{
    struct timespec length;
    struct wait w;
    REQUIRE(sigtimedwait, -1);
    bool scaled = relative(timeout, &length, &w);
    return REAL(sigtimedwait)(set, info, scaled ? &length : timeout);
}

EXPORT int semtimedop(int id, struct sembuf *ops, size_t n, const struct timespec *timeout)
{
    struct timespec length;
    struct wait w;
    REQUIRE(semtimedop, -1);
    bool scaled = relative(timeout, &length, &w);
    return REAL(semtimedop)(id, ops, n, scaled ? &length : timeout);
}

/* The kernel writes what is left of the timeout back. */
EXPORT int recvmmsg(int fd, struct mmsghdr *messages, unsigned n, int flags,
                    struct timespec *timeout)
{
    struct timespec length;
    struct wait w;
    REQUIRE(recvmmsg, -1);
    if (!relative(timeout, &length, &w))
        return REAL(recvmmsg)(fd, messages, n, flags, timeout);
    int result = REAL(recvmmsg)(fd, messages, n, flags, &length);
    if (result >= 0) {
        scale_back(&w, &length);
        *timeout = length;
    }
    return result;
}

EXPORT int aio_suspend(const struct aiocb *const list[], int n, const struct timespec *timeout)
{
    struct timespec length;
    struct wait w;
    REQUIRE(aio_suspend, -1);
    bool scaled = relative(timeout, &length, &w);
    return REAL(aio_suspend)(list, n, scaled ? &length : timeout);
}

EXPORT int aio_suspend64(const struct aiocb64 *const list[], int n,
                         const struct timespec *timeout)
{
    return aio_suspend((const struct aiocb *const *)list, n, timeout);
}

EXPORT int gai_suspend(const struct gaicb *const list[], int n, const struct timespec *timeout)
{
    struct timespec length;
    struct wait w;
    REQUIRE(gai_suspend, EAI_SYSTEM);
    bool scaled = relative(timeout, &length, &w);
    return REAL(gai_suspend)(list, n, scaled ? &length : timeout);
}

/* Message queues wait on CLOCK_REALTIME only. */
static const struct timespec *realtime_deadline(const struct timespec *deadline,
                                                struct timespec *buffer)
{
    struct wait w;
    if (!absolute(CLOCK_REALTIME, deadline, buffer, &w))
        return deadline;
    *buffer = on_clock(CLOCK_REALTIME, w.deadline);
    return buffer;
}

EXPORT int mq_timedsend(mqd_t queue, const char *message, size_t size, unsigned priority,
                        const struct timespec *deadline)
{
    struct timespec ts;
    REQUIRE(mq_timedsend, -1);
    return REAL(mq_timedsend)(queue, message, size, priority, realtime_deadline(deadline, &ts));
}

EXPORT ssize_t mq_timedreceive(mqd_t queue, char *restrict message, size_t size,
                               unsigned *restrict priority,
                               const struct timespec *restrict deadline)
{
    struct timespec ts;
    REQUIRE(mq_timedreceive, -1);
    return REAL(mq_timedreceive)(queue, message, size, priority,
                                 realtime_deadline(deadline, &ts));
}

/* ------------------------------------------------------------------------ */
/* Timers                                                                   */
/* ------------------------------------------------------------------------ */

/* False where the caller's own value has to go through as it is. */
static bool real_timer(clockid_t id, bool is_absolute, const struct itimerspec *v,
                       struct itimerspec *r)
{
    struct wait w;
    if (!timespec_valid(&v->it_value) || !timespec_valid(&v->it_interval))
        return false;
    if (v->it_value.tv_sec == 0 && v->it_value.tv_nsec == 0)
        return false; /* disarms the timer */
    if (is_absolute) {
        if (!absolute(id, &v->it_value, &r->it_value, &w))
            return false;
        r->it_value = on_clock(id, w.deadline);
    } else if (!relative(&v->it_value, &r->it_value, &w))
        return false;
    r->it_interval = ns_timespec(real_length(&w.m, timespec_ns(&v->it_interval)));
    return true;
}

static void virtual_timer(struct itimerspec *ts)
{
    struct wait w;
    if (!ts || !mapping_get(&w.m))
        return;
    scale_back(&w, &ts->it_value);
    scale_back(&w, &ts->it_interval);
}

/* The clock of a timer descriptor, which may be inherited or duplicated, so
   the kernel is asked.  -1 when it cannot be told. */
static clockid_t timerfd_clock(int fd)
{
    char path[40] = "/proc/self/fdinfo/", digits[12], text[512];
    size_t end = strlen(path), n = 0;
    if (fd < 0)
        return -1;
    do
        digits[n++] = (char)('0' + fd % 10);
    while (fd /= 10);
    while (n > 0)
        path[end++] = digits[--n];
    path[end] = '\0';
    long info = kernel(SYS_openat, AT_FDCWD, (long)path, O_RDONLY | O_CLOEXEC, 0, 0, 0);
    if (info < 0)
        return -1;
    long size = kernel(SYS_read, info, (long)text, sizeof text - 1, 0, 0, 0);
    kernel(SYS_close, info, 0, 0, 0, 0, 0);
    text[size < 0 ? 0 : size] = '\0';
    const char *found = strstr(text, "clockid:");
    return found ? (clockid_t)strtol(found + strlen("clockid:"), NULL, 10) : -1;
}

EXPORT int timerfd_settime(int fd, int flags, const struct itimerspec *new, struct itimerspec *old)
{
    struct itimerspec ts;
    struct mapping m;
    REQUIRE(timerfd_settime, -1);
    bool is_absolute = flags & TFD_TIMER_ABSTIME;
    clockid_t id = CLOCK_MONOTONIC;
    if (is_absolute && mapping_get(&m)) {
        id = timerfd_clock(fd);
        if (id < 0) {
            /* Not a timer descriptor, or no /proc: waiting for a virtual
               deadline on a real clock would be wrong. */
            int result = REAL(timerfd_gettime)(fd, &ts);
            errno = result == 0 ? ENOTSUP : errno;
            return -1;
        }
    }
    bool scaled = real_timer(id, is_absolute, new, &ts);
    int result = REAL(timerfd_settime)(fd, flags, scaled ? &ts : new, old);
    if (result == 0)
        virtual_timer(old);
    return result;
}

EXPORT int timerfd_gettime(int fd, struct itimerspec *ts)
{
    REQUIRE(timerfd_gettime, -1);
    int result = REAL(timerfd_gettime)(fd, ts);
    if (result == 0)
        virtual_timer(ts);
    return result;
}

static void virtual_itimer(int which, struct itimerval *tv)
{
    struct mapping m;
    if (which != ITIMER_REAL || !tv || !mapping_get(&m))
        return;
    tv->it_value = ns_timeval_up(virtual_length(&m, timeval_ns(&tv->it_value)));
    tv->it_interval = ns_timeval_up(virtual_length(&m, timeval_ns(&tv->it_interval)));
}

static bool timeval_valid(const struct timeval *tv)
{
    return tv->tv_sec >= 0 && tv->tv_usec >= 0 && tv->tv_usec < 1000000;
}

/* ITIMER_VIRTUAL and ITIMER_PROF count CPU time. */
static bool real_itimer(int which, const struct itimerval *v, struct itimerval *r)
{
    struct mapping m;
    if (which != ITIMER_REAL || !v || !timeval_valid(&v->it_value) ||
        !timeval_valid(&v->it_interval) || !mapping_get(&m))
        return false;
    r->it_value = ns_timeval_up(real_length(&m, timeval_ns(&v->it_value)));
    r->it_interval = ns_timeval_up(real_length(&m, timeval_ns(&v->it_interval)));
    return true;
}

EXPORT int setitimer(__itimer_which_t which, const struct itimerval *restrict new,
                     struct itimerval *restrict old)
{
    struct itimerval tv;
    REQUIRE(setitimer, -1);
    bool scaled = real_itimer((int)which, new, &tv);
    int result = REAL(setitimer)(which, scaled ? &tv : new, old);
    if (result == 0)
        virtual_itimer((int)which, old);
    return result;
}

EXPORT int getitimer(__itimer_which_t which, struct itimerval *tv)
{
    REQUIRE(getitimer, -1);
    int result = REAL(getitimer)(which, tv);
    if (result == 0)
        virtual_itimer((int)which, tv);
    return result;
}

/* Rounds what was left as the kernel does: to the nearest second, not to 0. */
EXPORT unsigned alarm(unsigned seconds)
{
    struct itimerval new = {.it_value = {.tv_sec = seconds}}, old = {0};
    if (setitimer(ITIMER_REAL, &new, &old) != 0)
        return 0;
    unsigned left = (unsigned)old.it_value.tv_sec;
    if (old.it_value.tv_usec >= 500000 || (left == 0 && old.it_value.tv_usec > 0))
        left++;
    return left;
}

EXPORT useconds_t ualarm(useconds_t value, useconds_t interval)
{
    struct itimerval new = {.it_value = {.tv_usec = value}, .it_interval = {.tv_usec = interval}};
    struct itimerval old;
    if (setitimer(ITIMER_REAL, &new, &old) != 0)
        return (useconds_t)-1;
    return (useconds_t)(old.it_value.tv_sec * 1000000 + old.it_value.tv_usec);
}

/*
 * POSIX timers do not tell their clock, so it is remembered.  The identifier
 * of a timer with SIGEV_THREAD is a tagged pointer and that of any other is
 * the kernel's number; both fit the same key.  A slot is free at clock FREE.
 */
enum { TIMERS_MAX = 256, SLOT_FREE = -1, SLOT_CLAIMED = -2 };

static struct {
    _Atomic intptr_t id;
    atomic_int clock_plus_one; /* so that zeroed memory is free slots */
} timers[TIMERS_MAX];

static int timer_claim(void)
{
    for (int i = 0; i < TIMERS_MAX; i++) {
        int expected = SLOT_FREE + 1;
        if (atomic_compare_exchange_strong(&timers[i].clock_plus_one, &expected,
                                           SLOT_CLAIMED + 1))
            return i;
    }
    return -1;
}

static void timer_remember(int slot, intptr_t id, clockid_t clock)
{
    atomic_store(&timers[slot].id, id);
    atomic_store(&timers[slot].clock_plus_one, clock + 1);
}

static void timer_release(int slot)
{
    atomic_store(&timers[slot].clock_plus_one, SLOT_FREE + 1);
}

static int timer_slot(intptr_t id)
{
    for (int i = 0; i < TIMERS_MAX; i++)
        if (atomic_load(&timers[i].clock_plus_one) > 0 && atomic_load(&timers[i].id) == id)
            return i;
    return -1;
}

/* A timer that is not known counts as one on a CPU-time clock. */
static clockid_t timer_clock(intptr_t id)
{
    int slot = timer_slot(id);
    if (slot < 0)
        return CLOCK_PROCESS_CPUTIME_ID;
    return atomic_load(&timers[slot].clock_plus_one) - 1;
}

static void timers_forget(void)
{
    for (int i = 0; i < TIMERS_MAX; i++)
        timer_release(i);
}

EXPORT int timer_create(clockid_t id, struct sigevent *restrict event, timer_t *restrict timer)
{
    REQUIRE(timer_create, -1);
    if (family_of(id) == NOT_SCALED)
        return REAL(timer_create)(id, event, timer);
    int slot = timer_claim();
    if (slot < 0) {
        errno = EAGAIN;
        return -1;
    }
    int result = REAL(timer_create)(id, event, timer);
    if (result == 0)
        timer_remember(slot, (intptr_t)*timer, id);
    else
        timer_release(slot);
    return result;
}

EXPORT int timer_delete(timer_t timer)
{
    REQUIRE(timer_delete, -1);
    int slot = timer_slot((intptr_t)timer);
    int result = REAL(timer_delete)(timer);
    if (result == 0 && slot >= 0)
        timer_release(slot);
    return result;
}

EXPORT int timer_settime(timer_t timer, int flags, const struct itimerspec *restrict new,
                         struct itimerspec *restrict old)
{
    struct itimerspec ts;
    REQUIRE(timer_settime, -1);
    clockid_t id = timer_clock((intptr_t)timer);
    if (family_of(id) == NOT_SCALED)
        return REAL(timer_settime)(timer, flags, new, old);
    bool scaled = real_timer(id, flags & TIMER_ABSTIME, new, &ts);
    int result = REAL(timer_settime)(timer, flags, scaled ? &ts : new, old);
    if (result == 0)
        virtual_timer(old);
    return result;
}

EXPORT int timer_gettime(timer_t timer, struct itimerspec *ts)
{
    REQUIRE(timer_gettime, -1);
    int result = REAL(timer_gettime)(timer, ts);
    if (result == 0 && family_of(timer_clock((intptr_t)timer)) != NOT_SCALED)
        virtual_timer(ts);
    return result;
}

/* ------------------------------------------------------------------------ */
/* Socket timeouts                                                          */
/* ------------------------------------------------------------------------ */

static bool is_socket_timeout(int level, int option)
{
    enum { RCVTIMEO_OLD = 20, SNDTIMEO_OLD = 21, RCVTIMEO_NEW = 66, SNDTIMEO_NEW = 67 };
    return level == SOL_SOCKET && (option == RCVTIMEO_OLD || option == SNDTIMEO_OLD ||
                                   option == RCVTIMEO_NEW || option == SNDTIMEO_NEW);
}

EXPORT int setsockopt(int fd, int level, int option, const void *value, socklen_t size)
{
    struct mapping m;
    struct timeval tv;
    REQUIRE(setsockopt, -1);
    if (is_socket_timeout(level, option) && value && size >= sizeof tv && mapping_get(&m)) {
        memcpy(&tv, value, sizeof tv);
        if (timeval_valid(&tv)) {
            tv = ns_timeval_up(real_length(&m, timeval_ns(&tv)));
            return REAL(setsockopt)(fd, level, option, &tv, sizeof tv);
        }
    }
    return REAL(setsockopt)(fd, level, option, value, size);
}

EXPORT int getsockopt(int fd, int level, int option, void *restrict value,
                      socklen_t *restrict size)
{
    struct mapping m;
    struct timeval tv;
    REQUIRE(getsockopt, -1);
    int result = REAL(getsockopt)(fd, level, option, value, size);
    if (result == 0 && is_socket_timeout(level, option) && *size >= sizeof tv &&
        mapping_get(&m)) {
        memcpy(&tv, value, sizeof tv);
        tv = ns_timeval_up(virtual_length(&m, timeval_ns(&tv)));
        memcpy(value, &tv, sizeof tv);
    }
    return result;
}

/* ------------------------------------------------------------------------ */
/* Carrying origin and rate to a program that is executed                   */
/* ------------------------------------------------------------------------ */

/*
 * A fork inherits the mapping with the memory.  An executed program gets it in
 * an environment variable: all words in hexadecimal.  CLOCK_MONOTONIC is the
 * same in both, so parent and child read the same virtual time.
 *
 * The variable is added at the exec, not only put into `environ` once, because
 * a caller may pass an environment of its own.  It is added only where
 * LD_PRELOAD still names this library: a program that is not preloaded runs in
 * real time, and that is its caller's choice.
 */
#define STATE_VARIABLE "RPCPROPS_CLOCK"
#define STATE_VERSION UINT64_C(1)

enum { STATE_SIZE = sizeof STATE_VARIABLE + 1 + 17 * (MAPPING_WORDS + 1) };

static char own_name[256];

static char *put_hex(char *out, uint64_t value)
{
    for (int shift = 60; shift >= 0; shift -= 4)
        *out++ = "0123456789abcdef"[value >> shift & 15];
    return out;
}

/* No stdio: this runs between fork or vfork and exec. */
static void format_state(char out[STATE_SIZE], const struct mapping *m)
{
    uint64_t words[MAPPING_WORDS];
    memcpy(words, m, sizeof words);
    memcpy(out, STATE_VARIABLE "=", sizeof STATE_VARIABLE);
    out = put_hex(out + sizeof STATE_VARIABLE, STATE_VERSION);
    for (size_t i = 0; i < MAPPING_WORDS; i++) {
        *out++ = ':';
        out = put_hex(out, words[i]);
    }
    *out = '\0';
}

static bool parse_state(const char *text, struct mapping *m)
{
    uint64_t words[MAPPING_WORDS];
    char *end;
    if (strtoull(text, &end, 16) != STATE_VERSION)
        return false;
    for (size_t i = 0; i < MAPPING_WORDS; i++) {
        if (*end != ':')
            return false;
        words[i] = strtoull(end + 1, &end, 16);
    }
    memcpy(m, words, sizeof words);
    return *end == '\0' && m->rate > 0;
}

static bool starts_with(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

static size_t count_strings(char *const list[])
{
    size_t n = 0;
    while (list && list[n])
        n++;
    return n;
}

/* Returns the environment to execute with: `copy`, which has room for two more
   strings, or the caller's own. */
static char *const *environment_with_state(char *const envp[], char **copy,
                                           char entry[STATE_SIZE])
{
    struct mapping m;
    bool preloaded = false;
    size_t n = 0;
    if (!envp || !own_name[0] || !mapping_get(&m))
        return envp;
    for (char *const *e = envp; *e; e++) {
        if (starts_with(*e, "LD_PRELOAD=") && strstr(*e, own_name))
            preloaded = true;
        if (!starts_with(*e, STATE_VARIABLE "="))
            copy[n++] = *e;
    }
    if (!preloaded)
        return envp;
    format_state(entry, &m);
    copy[n++] = entry;
    copy[n] = NULL;
    return copy;
}

/* The copy lives on the stack: nothing may be allocated after vfork. */
#define WITH_STATE(envp)                        \
    char *copy[count_strings(envp) + 2];        \
    char entry[STATE_SIZE];                     \
    envp = (char **)environment_with_state((envp), copy, entry)

EXPORT int execve(const char *path, char *const argv[], char *const envp[])
{
    REQUIRE(execve, -1);
    WITH_STATE(envp);
    return REAL(execve)(path, argv, envp);
}

EXPORT int execv(const char *path, char *const argv[])
{
    return execve(path, argv, environ);
}

EXPORT int execvpe(const char *file, char *const argv[], char *const envp[])
{
    REQUIRE(execvpe, -1);
    WITH_STATE(envp);
    return REAL(execvpe)(file, argv, envp);
}

EXPORT int execvp(const char *file, char *const argv[])
{
    return execvpe(file, argv, environ);
}

EXPORT int execveat(int fd, const char *path, char *const argv[], char *const envp[], int flags)
{
    REQUIRE(execveat, -1);
    WITH_STATE(envp);
    return REAL(execveat)(fd, path, argv, envp, flags);
}

EXPORT int fexecve(int fd, char *const argv[], char *const envp[])
{
    REQUIRE(fexecve, -1);
    WITH_STATE(envp);
    return REAL(fexecve)(fd, argv, envp);
}

EXPORT int posix_spawn(pid_t *restrict pid, const char *restrict path,
                       const posix_spawn_file_actions_t *restrict actions,
                       const posix_spawnattr_t *restrict attributes, char *const argv[restrict],
                       char *const envp[restrict])
{
    REQUIRE(posix_spawn, ENOSYS);
    WITH_STATE(envp);
    return REAL(posix_spawn)(pid, path, actions, attributes, argv, envp);
}

EXPORT int posix_spawnp(pid_t *restrict pid, const char *restrict file,
                        const posix_spawn_file_actions_t *restrict actions,
                        const posix_spawnattr_t *restrict attributes, char *const argv[restrict],
                        char *const envp[restrict])
{
    REQUIRE(posix_spawnp, ENOSYS);
    WITH_STATE(envp);
    return REAL(posix_spawnp)(pid, file, actions, attributes, argv, envp);
}

/* ------------------------------------------------------------------------ */
/* syscall()                                                                */
/* ------------------------------------------------------------------------ */

static long forward(long nr, const long a[6])
{
    __typeof__(&syscall) real_syscall = __atomic_load_n(&real.syscall, __ATOMIC_RELAXED);
    if (real_syscall)
        return real_syscall(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
    return kernel_errno(nr, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* A relative struct timespec in argument `index`, which the kernel may
   overwrite with what is left. */
static long forward_relative(long nr, long a[6], int index, bool written_back)
{
    struct timespec length, *timeout = (struct timespec *)a[index];
    struct wait w;
    if (!relative(timeout, &length, &w))
        return forward(nr, a);
    a[index] = (long)&length;
    long result = forward(nr, a);
    if (written_back) {
        int saved = errno;
        scale_back(&w, &length);
        *timeout = length;
        errno = saved;
    }
    return result;
}

static long forward_futex(long a[6])
{
    const struct timespec *deadline = (const struct timespec *)a[3];
    clockid_t id = a[1] & FUTEX_CLOCK_REALTIME ? CLOCK_REALTIME : CLOCK_MONOTONIC;
    struct timespec ts;
    struct wait w;
    switch (a[1] & FUTEX_CMD_MASK) {
    case FUTEX_WAIT:
        if (!relative(deadline, &ts, &w))
            return forward(SYS_futex, a);
        break;
    case FUTEX_WAIT_BITSET:
    case FUTEX_WAIT_REQUEUE_PI:
    case FUTEX_LOCK_PI2:
        if (!absolute(id, deadline, &ts, &w))
            return forward(SYS_futex, a);
        a[1] &= ~(long)FUTEX_CLOCK_REALTIME;
        break;
    case FUTEX_LOCK_PI:
        if (!absolute(CLOCK_REALTIME, deadline, &ts, &w))
            return forward(SYS_futex, a);
        ts = on_clock(CLOCK_REALTIME, w.deadline);
        break;
    default: /* this argument is no timeout */
        return forward(SYS_futex, a);
    }
    a[3] = (long)&ts;
    long result = forward(SYS_futex, a);
    if (result < 0)
        note_result(errno, &w);
    return result;
}

/* An absolute struct timespec in argument `index` on the clock in the next. */
static long forward_futex_clock(long nr, long a[6], int index)
{
    struct timespec ts;
    struct wait w;
    clockid_t id = (clockid_t)a[index + 1];
    if (!posix_wait_clock(id) || !absolute(id, (const struct timespec *)a[index], &ts, &w))
        return forward(nr, a);
    a[index] = (long)&ts;
    a[index + 1] = CLOCK_MONOTONIC;
    long result = forward(nr, a);
    if (result < 0)
        note_result(errno, &w);
    return result;
}

static long forward_timer_create(long a[6])
{
    clockid_t id = (clockid_t)a[0];
    if (family_of(id) == NOT_SCALED)
        return forward(SYS_timer_create, a);
    int slot = timer_claim();
    if (slot < 0) {
        errno = EAGAIN;
        return -1;
    }
    long result = forward(SYS_timer_create, a);
    if (result == 0)
        timer_remember(slot, *(const int *)a[2], id);
    else
        timer_release(slot);
    return result;
}

static long forward_timer_settime(long a[6])
{
    struct itimerspec ts;
    clockid_t id = timer_clock((int)a[0]);
    if (family_of(id) == NOT_SCALED)
        return forward(SYS_timer_settime, a);
    struct itimerspec *old = (struct itimerspec *)a[3];
    if (a[2] && real_timer(id, a[1] & TIMER_ABSTIME, (const struct itimerspec *)a[2], &ts))
        a[2] = (long)&ts;
    long result = forward(SYS_timer_settime, a);
    if (result == 0)
        virtual_timer(old);
    return result;
}

static long forward_timer_gettime(long a[6])
{
    long result = forward(SYS_timer_gettime, a);
    if (result == 0 && family_of(timer_clock((int)a[0])) != NOT_SCALED)
        virtual_timer((struct itimerspec *)a[1]);
    return result;
}

static long forward_timer_delete(long a[6])
{
    int slot = timer_slot((int)a[0]);
    long result = forward(SYS_timer_delete, a);
    if (result == 0 && slot >= 0)
        timer_release(slot);
    return result;
}

static long returned_error(int error)
{
    if (error == 0)
        return 0;
    errno = error;
    return -1;
}

EXPORT long syscall(long nr, ...)
{
    long a[6];
    va_list arguments;
    va_start(arguments, nr);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(arguments, long);
    va_end(arguments);

    switch (nr) {
    case SYS_clock_gettime:
        return clock_gettime((clockid_t)a[0], (struct timespec *)a[1]);
    case SYS_gettimeofday:
        if (!a[0])
            return forward(nr, a);
        return gettimeofday((struct timeval *)a[0], (void *)a[1]);
    case SYS_time:
        return time((time_t *)a[0]);
    case SYS_times:
        return times((struct tms *)a[0]);
    case SYS_sysinfo:
        return sysinfo((struct sysinfo *)a[0]);
    case SYS_clock_settime:
        return refuse_to_set() ? -1 : forward(nr, a);
    case SYS_settimeofday:
        return refuse_to_set() ? -1 : forward(nr, a);

    case SYS_nanosleep:
        return sleep_relative((const struct timespec *)a[0], (struct timespec *)a[1]);
    case SYS_clock_nanosleep:
        return returned_error(clock_nanosleep((clockid_t)a[0], (int)a[1],
                                              (const struct timespec *)a[2],
                                              (struct timespec *)a[3]));

    case SYS_poll:
        return poll((struct pollfd *)a[0], (nfds_t)a[1], (int)a[2]);
    case SYS_select:
        return select((int)a[0], (fd_set *)a[1], (fd_set *)a[2], (fd_set *)a[3],
                      (struct timeval *)a[4]);
    case SYS_ppoll:
        return forward_relative(nr, a, 2, true);
    case SYS_pselect6:
        return forward_relative(nr, a, 4, true);
    case SYS_epoll_wait:
        return epoll_wait((int)a[0], (struct epoll_event *)a[1], (int)a[2], (int)a[3]);
    case SYS_epoll_pwait:
        return epoll_pwait((int)a[0], (struct epoll_event *)a[1], (int)a[2], (int)a[3],
                           (const sigset_t *)a[4]);
    case SYS_epoll_pwait2:
        return forward_relative(nr, a, 3, false);

    case SYS_futex:
        return forward_futex(a);
    case SYS_futex_waitv:
        return forward_futex_clock(nr, a, 3);
    case SYS_futex_wait:
        return forward_futex_clock(nr, a, 4);

    case SYS_rt_sigtimedwait:
        return forward_relative(nr, a, 2, false);
    case SYS_semtimedop:
        return forward_relative(nr, a, 3, false);
    case SYS_recvmmsg:
        return forward_relative(nr, a, 4, true);
    case SYS_io_getevents:
    case SYS_io_pgetevents:
        return forward_relative(nr, a, 4, false);
    case SYS_mq_timedsend:
    case SYS_mq_timedreceive: {
        struct timespec ts;
        a[4] = (long)realtime_deadline((const struct timespec *)a[4], &ts);
        return forward(nr, a);
    }

    case SYS_timerfd_settime:
        return timerfd_settime((int)a[0], (int)a[1], (const struct itimerspec *)a[2],
                               (struct itimerspec *)a[3]);
    case SYS_timerfd_gettime:
        return timerfd_gettime((int)a[0], (struct itimerspec *)a[1]);
    case SYS_setitimer:
        return setitimer((__itimer_which_t)a[0], (const struct itimerval *)a[1],
                         (struct itimerval *)a[2]);
    case SYS_getitimer:
        return getitimer((__itimer_which_t)a[0], (struct itimerval *)a[1]);
    case SYS_alarm:
        return alarm((unsigned)a[0]);
    case SYS_timer_create:
        return forward_timer_create(a);
    case SYS_timer_settime:
        return forward_timer_settime(a);
    case SYS_timer_gettime:
        return forward_timer_gettime(a);
    case SYS_timer_delete:
        return forward_timer_delete(a);

    case SYS_setsockopt:
        return setsockopt((int)a[0], (int)a[1], (int)a[2], (const void *)a[3],
                          (socklen_t)a[4]);
    case SYS_getsockopt:
        return getsockopt((int)a[0], (int)a[1], (int)a[2], (void *)a[3], (socklen_t *)a[4]);

    case SYS_execve:
        return execve((const char *)a[0], (char *const *)a[1], (char *const *)a[2]);
    case SYS_execveat:
        return execveat((int)a[0], (const char *)a[1], (char *const *)a[2],
                        (char *const *)a[3], (int)a[4]);
    default:
        return forward(nr, a);
    }
}

/* ------------------------------------------------------------------------ */
/* Changing the rate                                                        */
/* ------------------------------------------------------------------------ */

static void writer_lock(void)
{
    while (atomic_flag_test_and_set_explicit(&state.writer, memory_order_acquire))
        kernel(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
}

static void writer_unlock(void)
{
    atomic_flag_clear_explicit(&state.writer, memory_order_release);
}

static void store_mapping(const struct mapping *m)
{
    uint64_t words[MAPPING_WORDS];
    memcpy(words, m, sizeof words);
    for (size_t i = 0; i < MAPPING_WORDS; i++)
        atomic_store_explicit(&state.words[i], words[i], memory_order_relaxed);
    atomic_store_explicit(&state.rate, (double)m->rate / RATE_ONE, memory_order_relaxed);
}

/*
 * The offsets of the clocks from CLOCK_MONOTONIC.  Reading the other clock
 * second makes the offset too large by the time between the two reads, never
 * too small: at the change a clock may skip some nanoseconds, but it cannot
 * run backwards.  The reads are repeated while something came between them:
 * processes that share an origin read their offsets each for itself.
 */
static void read_offsets(struct mapping *m)
{
    for (int family = 0; family < FAMILIES; family++) {
        int64_t before, there, after;
        int tries = 0;
        do {
            before = real_now(CLOCK_MONOTONIC);
            there = real_now(family_clock[family]);
            after = real_now(CLOCK_MONOTONIC);
        } while (after - before > OFFSET_NS && ++tries < OFFSET_TRIES);
        m->offset[family] = family == MONOTONIC ? 0 : there - before;
    }
}

/*
 * The kernel may end a wait late by the timer slack, 50 us, which the rate
 * would multiply.  The slack belongs to a thread and to the threads it starts.
 */
static void set_timer_slack(const struct mapping *m)
{
    int64_t slack = from_u128(((u128)(uint64_t)m->slack << FRACTION_BITS) / m->rate);
    kernel(SYS_prctl, PR_SET_TIMERSLACK, slack < 1 ? 1 : slack, 0, 0, 0, 0);
}

static int static_check(void);

int rpcprops_clock_set_rate(double rate)
{
    return rpcprops_clock_set_rate_from(rate, NEVER);
}

/*
 * As if the rate had been set at `origin_ns` of the real CLOCK_MONOTONIC, if
 * that is past: processes that leave rate 1 from one origin read one clock.
 */
int rpcprops_clock_set_rate_from(double rate, int64_t origin_ns)
{
    if (!(rate >= RATE_MIN && rate <= RATE_MAX)) {
        errno = EINVAL;
        return -1;
    }
    if (static_check() != CHECK_OK) {
        errno = ENOTSUP;
        return -1;
    }

    struct mapping m;
    uint64_t every_signal = UINT64_MAX, old_signals;
    /* A handler that read the clock during the change would wait for itself. */
    kernel(SYS_rt_sigprocmask, SIG_BLOCK, (long)&every_signal, (long)&old_signals,
           sizeof every_signal, 0, 0);
    writer_lock();
    bool first = !mapping_get(&m);
    unsigned sequence = atomic_load_explicit(&state.sequence, memory_order_relaxed);
    atomic_store_explicit(&state.sequence, sequence + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (first) {
        m = (struct mapping){.slack = kernel(SYS_prctl, PR_GET_TIMERSLACK, 0, 0, 0, 0, 0)};
        read_offsets(&m);
    }
    /* No reader can see a later instant of the old line than this one. */
    int64_t now = real_now(CLOCK_MONOTONIC);
    /* From an origin within the old line the new one is ahead, if it is not
       slower: the clock skips forward, and does not run backwards. */
    bool ahead = origin_ns < now && (first || origin_ns >= m.rbase) &&
                 rate * RATE_ONE >= (first ? RATE_ONE : (double)m.rate);
    int64_t from = ahead ? origin_ns : now;
    m.vbase = first ? from : virtual_at(m.rate, m.rbase, m.vbase, from);
    m.rbase = from;
    m.rate = (uint64_t)(rate * RATE_ONE + 0.5);
    store_mapping(&m);
    /* Keeps what was asked for, not its fixed-point image. */
    atomic_store_explicit(&state.rate, rate, memory_order_relaxed);
    atomic_store_explicit(&state.sequence, sequence + 2, memory_order_release);
    writer_unlock();
    kernel(SYS_rt_sigprocmask, SIG_SETMASK, (long)&old_signals, 0, sizeof old_signals, 0, 0);

    set_timer_slack(&m);
    /* For system(), popen() and execl(), which execute inside the C library. */
    char entry[STATE_SIZE];
    format_state(entry, &m);
    setenv(STATE_VARIABLE, entry + sizeof STATE_VARIABLE, 1);
    return 0;
}

double rpcprops_clock_get_rate(void)
{
    double rate = atomic_load_explicit(&state.rate, memory_order_relaxed);
    return rate > 0 ? rate : 1.0;
}

int64_t rpcprops_clock_real_ns(int clockid)
{
    return real_now(clockid);
}

/* ------------------------------------------------------------------------ */
/* Self check                                                               */
/* ------------------------------------------------------------------------ */

static bool condvar_bit_is(clockid_t id, int shared)
{
    pthread_condattr_t attributes;
    pthread_cond_t cond;
    pthread_condattr_init(&attributes);
    bool right = pthread_condattr_setclock(&attributes, id) == 0 &&
                 pthread_condattr_setpshared(&attributes, shared) == 0 &&
                 pthread_cond_init(&cond, &attributes) == 0;
    if (right) {
        right = condvar_clock(&cond) == id;
        pthread_cond_destroy(&cond);
    }
    pthread_condattr_destroy(&attributes);
    return right;
}

/* Optional, because callers do without or are told ENOSYS. */
static bool may_be_missing(const char *name)
{
    static const char *const optional[] = {"epoll_pwait2", "execveat", "gai_suspend", "aio_suspend"};
    for (size_t i = 0; i < sizeof optional / sizeof optional[0]; i++)
        if (strcmp(name, optional[i]) == 0)
            return true;
    return false;
}

/* What must hold before a rate may be set: needs no waiting and no dilation. */
static int static_check(void)
{
    static atomic_int known = -1;
    int result = atomic_load(&known);
    if (result >= 0)
        return result;
    result = CHECK_OK;
    resolve_real_functions();
    for (int i = 0; i < REAL_FUNCTION_COUNT; i++)
        if (!*real_functions[i].slot && !may_be_missing(real_functions[i].name))
            result = CHECK_SYMBOL_MISSING;
    if (result == CHECK_OK && (!condvar_bit_is(CLOCK_REALTIME, PTHREAD_PROCESS_PRIVATE) ||
                               !condvar_bit_is(CLOCK_MONOTONIC, PTHREAD_PROCESS_PRIVATE) ||
                               !condvar_bit_is(CLOCK_REALTIME, PTHREAD_PROCESS_SHARED) ||
                               !condvar_bit_is(CLOCK_MONOTONIC, PTHREAD_PROCESS_SHARED)))
        result = CHECK_CONDVAR_LAYOUT;
    atomic_store(&known, result);
    return result;
}

/* True when the names that a program calls lead to this library. */
static bool is_interposed(void)
{
    static const char *const names[] = {"clock_gettime", "nanosleep", "clock_nanosleep", "poll",
                                        "epoll_wait", "select", "pthread_cond_wait",
                                        "pthread_cond_timedwait", "pthread_cond_clockwait",
                                        "sem_clockwait", "syscall"};
    Dl_info own, found;
    if (!dladdr((void *)&static_check, &own))
        return false;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        void *symbol = dlsym(RTLD_DEFAULT, names[i]);
        if (!symbol || !dladdr(symbol, &found) || found.dli_fbase != own.dli_fbase)
            return false;
    }
    return true;
}

/* A short wait on a clock has to time out, and not early. */
static bool condvar_wait_is_right(clockid_t id)
{
    pthread_condattr_t attributes;
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond;
    struct timespec deadline, now;
    int result;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, id);
    pthread_cond_init(&cond, &attributes);
    pthread_mutex_lock(&mutex);
    clock_gettime(id, &deadline);
    deadline = ns_timespec(timespec_ns(&deadline) + NS_PER_MS);
    do
        result = pthread_cond_timedwait(&cond, &mutex, &deadline);
    while (result == 0);
    clock_gettime(id, &now);
    pthread_mutex_unlock(&mutex);
    pthread_cond_destroy(&cond);
    pthread_condattr_destroy(&attributes);
    return result == ETIMEDOUT && timespec_ns(&now) >= timespec_ns(&deadline);
}

static bool clocks_run_forward(void)
{
    for (int family = 0; family < FAMILIES; family++) {
        struct timespec before, after;
        clock_gettime(family_clock[family], &before);
        for (int i = 0; i < 100; i++) {
            clock_gettime(family_clock[family], &after);
            if (timespec_ns(&after) < timespec_ns(&before))
                return false;
            before = after;
        }
    }
    return true;
}

static bool arithmetic_is_right(void)
{
    static const int64_t lengths[] = {1, 999, 1000000, 10000000000, INT64_MAX / 4};
    struct mapping m;
    if (!mapping_get(&m))
        return true;
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
        int64_t length = real_length(&m, lengths[i]);
        if (length != NEVER && scale(m.rate, length) < lengths[i])
            return false;
        if (length > 1 && length != NEVER && scale(m.rate, length - 1) >= lengths[i])
            return false;
    }
    return true;
}

int rpcprops_clock_selfcheck(void)
{
    int result = static_check();
    if (result != CHECK_OK)
        return result;
    if (!is_interposed())
        return CHECK_NOT_INTERPOSED;
    if (!arithmetic_is_right())
        return CHECK_ARITHMETIC;
    if (!clocks_run_forward())
        return CHECK_CLOCK_BACKWARDS;
    if (!condvar_wait_is_right(CLOCK_REALTIME) || !condvar_wait_is_right(CLOCK_MONOTONIC))
        return CHECK_CONDVAR_WAIT;
    return CHECK_OK;
}

/* ------------------------------------------------------------------------ */
/* Start and fork                                                           */
/* ------------------------------------------------------------------------ */

/* A fork during a change would leave the child with an odd sequence, and its
   clock reads would wait for ever. */
static void after_fork_in_child(void)
{
    writer_unlock();
    timers_forget();
}

static void fail(const char *message)
{
    kernel(SYS_write, STDERR_FILENO, (long)message, (long)strlen(message), 0, 0, 0);
    kernel(SYS_exit_group, 120, 0, 0, 0, 0, 0);
}

static void learn_own_name(void)
{
    Dl_info own;
    if (!dladdr((void *)&static_check, &own) || !own.dli_fname)
        return;
    const char *slash = strrchr(own.dli_fname, '/');
    const char *name = slash ? slash + 1 : own.dli_fname;
    if (strlen(name) < sizeof own_name)
        strcpy(own_name, name);
}

/* A wrong clock is worse than none, so a process that cannot take over the
   time of its parent does not run. */
static void inherit_state(void)
{
    struct mapping m;
    const char *text = getenv(STATE_VARIABLE);
    if (!text || atomic_load(&state.sequence) != 0)
        return;
    if (!parse_state(text, &m))
        fail("rpcprops clock: " STATE_VARIABLE " is malformed; unset it\n");
    if (static_check() != CHECK_OK)
        fail("rpcprops clock: this C library is not supported; unset LD_PRELOAD\n");
    store_mapping(&m);
    atomic_store_explicit(&state.sequence, 2, memory_order_release);
    set_timer_slack(&m);
}

__attribute__((constructor)) static void start(void)
{
    resolve_real_functions();
    learn_own_name();
    pthread_atfork(writer_lock, writer_unlock, after_fork_in_child);
    inherit_state();
    atomic_store(&started, true);
}
