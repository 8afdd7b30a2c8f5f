/*
 * Drives every call that the clock library replaces.
 *
 *   driver waits RATE LENGTH_NS [CASE...]   one line per case:
 *       name, requested, virtual and real nanoseconds that passed, "ok" or the fault
 *   driver edges RATE                       one line per case: name, "ok" or the fault
 *   driver reads RATE                       ditto
 *   driver cost RATE ROUNDS                 nanoseconds per read: name, replaced, real
 *   driver forward                          clocks read by threads while the rate changes
 *   driver exec HOW                         executes "driver origin" in one way
 *   driver origin                           rate, virtual monotonic ns, real monotonic ns
 */
#define _GNU_SOURCE 1
#include <aio.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <mqueue.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/times.h>
#include <sys/wait.h>
#include <threads.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_futex_waitv
#define SYS_futex_waitv 449
#endif
#ifndef FUTEX_LOCK_PI2
#define FUTEX_LOCK_PI2 13
#endif

#define S INT64_C(1000000000)

static int (*set_rate)(double);
static double (*get_rate)(void);
static int64_t (*real_ns)(int);

static int64_t ns_of(struct timespec ts)
{
    return (int64_t)ts.tv_sec * S + ts.tv_nsec;
}

static struct timespec ts_of(int64_t ns)
{
    return (struct timespec){ns / S, ns % S};
}

static struct timeval tv_of(int64_t ns)
{
    return (struct timeval){ns / S, ns % S / 1000};
}

static int64_t now(clockid_t id)
{
    struct timespec ts;
    clock_gettime(id, &ts);
    return ns_of(ts);
}

static struct timespec at(clockid_t id, int64_t length)
{
    return ts_of(now(id) + length);
}

static char fault[200];

static int expect(const char *what, int64_t got, int64_t wanted)
{
    if (got == wanted)
        return 0;
    snprintf(fault, sizeof fault, "%s:%" PRId64 ",expected:%" PRId64, what, got, wanted);
    return -1;
}

static int expect_errno(int64_t got, int wanted_errno)
{
    if (got != -1)
        return expect("result", got, -1);
    return expect("errno", errno, wanted_errno);
}

static int expect_between(const char *what, int64_t got, int64_t low, int64_t high)
{
    if (got >= low && got <= high)
        return 0;
    snprintf(fault, sizeof fault, "%s:%" PRId64 ",expected:%" PRId64 "..%" PRId64, what, got, low,
             high);
    return -1;
}

/* ---------------------------------------------------------------- waits -- */

static int w_nanosleep(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", nanosleep(&ts, NULL), 0);
}
/* Aliases that no header declares. */
static void *symbol(const char *name)
{
    return dlsym(RTLD_DEFAULT, name);
}
static int w_alias___nanosleep(int64_t l)
{
    struct timespec ts = ts_of(l);
    int (*call)(const struct timespec *, struct timespec *);
    *(void **)&call = symbol("__nanosleep");
    return expect("result", call(&ts, NULL), 0);
}
static int w_alias___poll(int64_t l)
{
    int (*call)(struct pollfd *, nfds_t, int);
    *(void **)&call = symbol("__poll");
    return expect("result", call(NULL, 0, (int)(l / 1000000)), 0);
}
static int w_alias___select(int64_t l)
{
    struct timeval tv = tv_of(l);
    int (*call)(int, fd_set *, fd_set *, fd_set *, struct timeval *);
    *(void **)&call = symbol("__select");
    return expect("result", call(0, NULL, NULL, NULL, &tv), 0);
}
static int w_clock_nanosleep_relative(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", clock_nanosleep(CLOCK_MONOTONIC, 0, &ts, NULL), 0);
}
static int w_clock_nanosleep_monotonic(int64_t l)
{
    struct timespec ts = at(CLOCK_MONOTONIC, l);
    return expect("result", clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL), 0);
}
static int w_clock_nanosleep_realtime(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &ts, NULL), 0);
}
static int w_clock_nanosleep_boottime(int64_t l)
{
    struct timespec ts = at(CLOCK_BOOTTIME, l);
    return expect("result", clock_nanosleep(CLOCK_BOOTTIME, TIMER_ABSTIME, &ts, NULL), 0);
}
static int w_clock_nanosleep_tai(int64_t l)
{
    struct timespec ts = at(CLOCK_TAI, l);
    return expect("result", clock_nanosleep(CLOCK_TAI, TIMER_ABSTIME, &ts, NULL), 0);
}
static int w_usleep(int64_t l)
{
    return expect("result", usleep((useconds_t)(l / 1000)), 0);
}
static int w_sleep(int64_t l)
{
    return expect("result", sleep((unsigned)(l / S)), 0);
}
static int w_thrd_sleep(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", thrd_sleep(&ts, NULL), 0);
}
static int w_syscall_nanosleep(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", syscall(SYS_nanosleep, &ts, NULL), 0);
}
static int w_syscall_clock_nanosleep(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", syscall(SYS_clock_nanosleep, CLOCK_REALTIME, TIMER_ABSTIME, &ts, NULL),
                  0);
}

static int w_poll(int64_t l)
{
    return expect("result", poll(NULL, 0, (int)(l / 1000000)), 0);
}
static int w_ppoll(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", ppoll(NULL, 0, &ts, NULL), 0) || expect("timeout", ns_of(ts), l);
}
int __poll_chk(struct pollfd *, nfds_t, int, size_t);
int __ppoll_chk(struct pollfd *, nfds_t, const struct timespec *, const sigset_t *, size_t);
static int w_poll_chk(int64_t l)
{
    return expect("result", __poll_chk(NULL, 0, (int)(l / 1000000), 0), 0);
}
static int w_ppoll_chk(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", __ppoll_chk(NULL, 0, &ts, NULL, 0), 0);
}
static int w_select(int64_t l)
{
    struct timeval tv = tv_of(l);
    return expect("result", select(0, NULL, NULL, NULL, &tv), 0) ||
           expect("left", tv.tv_sec * 1000000 + tv.tv_usec, 0);
}
static int w_select_many_us(int64_t l)
{
    struct timeval tv = {0, l / 1000};
    return expect("result", select(0, NULL, NULL, NULL, &tv), 0);
}
static int w_pselect(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", pselect(0, NULL, NULL, NULL, &ts, NULL), 0) ||
           expect("timeout", ns_of(ts), l);
}
static int w_epoll_wait(int64_t l)
{
    struct epoll_event event;
    int fd = epoll_create1(0), result = epoll_wait(fd, &event, 1, (int)(l / 1000000));
    close(fd);
    return expect("result", result, 0);
}
static int w_epoll_pwait(int64_t l)
{
    struct epoll_event event;
    sigset_t none;
    sigemptyset(&none);
    int fd = epoll_create1(0), result = epoll_pwait(fd, &event, 1, (int)(l / 1000000), &none);
    close(fd);
    return expect("result", result, 0);
}
static int w_epoll_pwait2(int64_t l)
{
    struct epoll_event event;
    struct timespec ts = ts_of(l);
    int fd = epoll_create1(0), result = epoll_pwait2(fd, &event, 1, &ts, NULL);
    close(fd);
    return expect("result", result, 0);
}
static int w_syscall_poll(int64_t l)
{
    return expect("result", syscall(SYS_poll, NULL, 0L, l / 1000000), 0);
}
static int w_syscall_ppoll(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", syscall(SYS_ppoll, NULL, 0L, &ts, NULL, 8L), 0) ||
           expect("left", ns_of(ts), 0);
}
static int w_syscall_select(int64_t l)
{
    struct timeval tv = tv_of(l);
    return expect("result", syscall(SYS_select, 0L, NULL, NULL, NULL, &tv), 0) ||
           expect("left", tv.tv_sec * 1000000 + tv.tv_usec, 0);
}
static int w_syscall_pselect6(int64_t l)
{
    struct timespec ts = ts_of(l);
    return expect("result", syscall(SYS_pselect6, 0L, NULL, NULL, NULL, &ts, NULL), 0) ||
           expect("left", ns_of(ts), 0);
}
static int w_syscall_epoll_wait(int64_t l)
{
    struct epoll_event event;
    int fd = epoll_create1(0);
    long result = syscall(SYS_epoll_wait, (long)fd, &event, 1L, l / 1000000);
    close(fd);
    return expect("result", result, 0);
}
static int w_syscall_epoll_pwait(int64_t l)
{
    struct epoll_event event;
    int fd = epoll_create1(0);
    long result = syscall(SYS_epoll_pwait, (long)fd, &event, 1L, l / 1000000, NULL, 8L);
    close(fd);
    return expect("result", result, 0);
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static int cond_wait(clockid_t id, clockid_t wait_id, int shared, int64_t l)
{
    pthread_condattr_t attr;
    pthread_cond_t cond;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, id);
    pthread_condattr_setpshared(&attr, shared);
    pthread_cond_init(&cond, &attr);
    pthread_mutex_lock(&mutex);
    struct timespec ts = at(wait_id < 0 ? id : wait_id, l);
    int result;
    do
        result = wait_id < 0 ? pthread_cond_timedwait(&cond, &mutex, &ts)
                             : pthread_cond_clockwait(&cond, &mutex, wait_id, &ts);
    while (result == 0);
    pthread_mutex_unlock(&mutex);
    pthread_cond_destroy(&cond);
    return expect("result", result, ETIMEDOUT);
}
/* Woken by a thread that sleeps for so long. */
static pthread_cond_t woken = PTHREAD_COND_INITIALIZER;
static bool is_woken;
static void *wake_main(void *length)
{
    struct timespec ts = at(CLOCK_MONOTONIC, *(int64_t *)length);
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL);
    pthread_mutex_lock(&mutex);
    is_woken = true;
    pthread_cond_signal(&woken);
    pthread_mutex_unlock(&mutex);
    return NULL;
}
static int w_cond_wait(int64_t l)
{
    pthread_t thread;
    int result = 0;
    is_woken = false;
    pthread_create(&thread, NULL, wake_main, &l);
    pthread_mutex_lock(&mutex);
    while (!is_woken && result == 0)
        result = pthread_cond_wait(&woken, &mutex);
    pthread_mutex_unlock(&mutex);
    pthread_join(thread, NULL);
    return expect("result", result, 0);
}

static int w_cond_timedwait_realtime(int64_t l)
{
    return cond_wait(CLOCK_REALTIME, -1, PTHREAD_PROCESS_PRIVATE, l);
}
static int w_cond_timedwait_monotonic(int64_t l)
{
    return cond_wait(CLOCK_MONOTONIC, -1, PTHREAD_PROCESS_PRIVATE, l);
}
static int w_cond_timedwait_shared(int64_t l)
{
    return cond_wait(CLOCK_MONOTONIC, -1, PTHREAD_PROCESS_SHARED, l);
}
static int w_cond_clockwait_realtime(int64_t l)
{
    return cond_wait(CLOCK_MONOTONIC, CLOCK_REALTIME, PTHREAD_PROCESS_PRIVATE, l);
}
static int w_cond_clockwait_monotonic(int64_t l)
{
    return cond_wait(CLOCK_REALTIME, CLOCK_MONOTONIC, PTHREAD_PROCESS_PRIVATE, l);
}

static int w_sem_timedwait(int64_t l)
{
    sem_t sem;
    sem_init(&sem, 0, 0);
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect_errno(sem_timedwait(&sem, &ts), ETIMEDOUT);
}
static int w_sem_clockwait(int64_t l)
{
    sem_t sem;
    sem_init(&sem, 0, 0);
    struct timespec ts = at(CLOCK_MONOTONIC, l);
    return expect_errno(sem_clockwait(&sem, CLOCK_MONOTONIC, &ts), ETIMEDOUT);
}

/* Runs a wait in a second thread while this one holds what it waits for. */
static int (*other_wait)(int64_t);
static void *other_main(void *length)
{
    return (void *)(intptr_t)other_wait(*(int64_t *)length);
}
static int in_other_thread(int (*wait)(int64_t), int64_t l)
{
    pthread_t thread;
    void *result;
    other_wait = wait;
    pthread_create(&thread, NULL, other_main, &l);
    pthread_join(thread, &result);
    return (int)(intptr_t)result;
}

static int o_mutex_timedlock(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", pthread_mutex_timedlock(&mutex, &ts), ETIMEDOUT);
}
static int o_mutex_clocklock(int64_t l)
{
    struct timespec ts = at(CLOCK_MONOTONIC, l);
    return expect("result", pthread_mutex_clocklock(&mutex, CLOCK_MONOTONIC, &ts), ETIMEDOUT);
}
static int locked(int (*wait)(int64_t), int64_t l)
{
    pthread_mutex_lock(&mutex);
    int result = in_other_thread(wait, l);
    pthread_mutex_unlock(&mutex);
    return result;
}
static int w_mutex_timedlock(int64_t l)
{
    return locked(o_mutex_timedlock, l);
}
static int w_mutex_clocklock(int64_t l)
{
    return locked(o_mutex_clocklock, l);
}
static pthread_mutex_t pi_mutex;
static int o_pi_timedlock(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", pthread_mutex_timedlock(&pi_mutex, &ts), ETIMEDOUT);
}
static int w_mutex_timedlock_inheriting(int64_t l)
{
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setprotocol(&attr, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&pi_mutex, &attr);
    pthread_mutex_lock(&pi_mutex);
    int result = in_other_thread(o_pi_timedlock, l);
    pthread_mutex_unlock(&pi_mutex);
    return result;
}

static pthread_rwlock_t rwlock = PTHREAD_RWLOCK_INITIALIZER;
static int o_timedrdlock(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", pthread_rwlock_timedrdlock(&rwlock, &ts), ETIMEDOUT);
}
static int o_timedwrlock(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", pthread_rwlock_timedwrlock(&rwlock, &ts), ETIMEDOUT);
}
static int o_clockrdlock(int64_t l)
{
    struct timespec ts = at(CLOCK_MONOTONIC, l);
    return expect("result", pthread_rwlock_clockrdlock(&rwlock, CLOCK_MONOTONIC, &ts), ETIMEDOUT);
}
static int o_clockwrlock(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", pthread_rwlock_clockwrlock(&rwlock, CLOCK_REALTIME, &ts), ETIMEDOUT);
}
static int write_locked(int (*wait)(int64_t), int64_t l)
{
    pthread_rwlock_wrlock(&rwlock);
    int result = in_other_thread(wait, l);
    pthread_rwlock_unlock(&rwlock);
    return result;
}
static int w_rwlock_timedrdlock(int64_t l)
{
    return write_locked(o_timedrdlock, l);
}
static int w_rwlock_timedwrlock(int64_t l)
{
    return write_locked(o_timedwrlock, l);
}
static int w_rwlock_clockrdlock(int64_t l)
{
    return write_locked(o_clockrdlock, l);
}
static int w_rwlock_clockwrlock(int64_t l)
{
    return write_locked(o_clockwrlock, l);
}

static sem_t release;
static void *hold(void *unused)
{
    (void)unused;
    sem_wait(&release);
    return NULL;
}
static int join_wait(int monotonic, int64_t l)
{
    pthread_t thread;
    struct timespec ts;
    sem_init(&release, 0, 0);
    pthread_create(&thread, NULL, hold, NULL);
    int result;
    if (monotonic) {
        ts = at(CLOCK_MONOTONIC, l);
        result = pthread_clockjoin_np(thread, NULL, CLOCK_MONOTONIC, &ts);
    } else {
        ts = at(CLOCK_REALTIME, l);
        result = pthread_timedjoin_np(thread, NULL, &ts);
    }
    sem_post(&release);
    pthread_join(thread, NULL);
    return expect("result", result, ETIMEDOUT);
}
static int w_timedjoin(int64_t l)
{
    return join_wait(0, l);
}
static int w_clockjoin(int64_t l)
{
    return join_wait(1, l);
}

static mtx_t c11_mutex;
static int w_cnd_timedwait(int64_t l)
{
    cnd_t cond;
    cnd_init(&cond);
    mtx_init(&c11_mutex, mtx_timed);
    mtx_lock(&c11_mutex);
    struct timespec ts = at(CLOCK_REALTIME, l);
    int result;
    do
        result = cnd_timedwait(&cond, &c11_mutex, &ts);
    while (result == thrd_success);
    mtx_unlock(&c11_mutex);
    cnd_destroy(&cond);
    return expect("result", result, thrd_timedout);
}
static int o_mtx_timedlock(int64_t l)
{
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect("result", mtx_timedlock(&c11_mutex, &ts), thrd_timedout);
}
static int w_mtx_timedlock(int64_t l)
{
    mtx_init(&c11_mutex, mtx_timed);
    mtx_lock(&c11_mutex);
    int result = in_other_thread(o_mtx_timedlock, l);
    mtx_unlock(&c11_mutex);
    return result;
}

static int futex_word;
static int futex_wait(int op, struct timespec ts, uint32_t mask)
{
    return expect_errno(syscall(SYS_futex, &futex_word, (long)op, 0L, &ts, NULL, (long)mask),
                        ETIMEDOUT);
}
static int w_futex_wait(int64_t l)
{
    return futex_wait(FUTEX_WAIT_PRIVATE, ts_of(l), 0);
}
static int w_futex_bitset_monotonic(int64_t l)
{
    return futex_wait(FUTEX_WAIT_BITSET_PRIVATE, at(CLOCK_MONOTONIC, l),
                      FUTEX_BITSET_MATCH_ANY);
}
static int w_futex_bitset_realtime(int64_t l)
{
    return futex_wait(FUTEX_WAIT_BITSET_PRIVATE | FUTEX_CLOCK_REALTIME, at(CLOCK_REALTIME, l),
                      FUTEX_BITSET_MATCH_ANY);
}
static int futex_requeue_word;
static int w_futex_requeue_pi(int64_t l)
{
    struct timespec ts = at(CLOCK_MONOTONIC, l);
    return expect_errno(syscall(SYS_futex, &futex_word, (long)FUTEX_WAIT_REQUEUE_PI_PRIVATE, 0L,
                                &ts, &futex_requeue_word, 0L),
                        ETIMEDOUT);
}
static int futex_lock_word, futex_lock_op;
static int o_futex_lock(int64_t l)
{
    struct timespec ts =
        at(futex_lock_op == FUTEX_LOCK_PI_PRIVATE ? CLOCK_REALTIME : CLOCK_MONOTONIC, l);
    return expect_errno(syscall(SYS_futex, &futex_lock_word, (long)futex_lock_op, 0L, &ts, NULL,
                                0L),
                        ETIMEDOUT);
}
static int futex_locked(int op, int64_t l)
{
    futex_lock_word = (int)syscall(SYS_gettid);
    futex_lock_op = op;
    return in_other_thread(o_futex_lock, l);
}
static int w_futex_lock_pi(int64_t l)
{
    return futex_locked(FUTEX_LOCK_PI_PRIVATE, l);
}
static int w_futex_lock_pi2(int64_t l)
{
    return futex_locked(FUTEX_LOCK_PI2 | FUTEX_PRIVATE_FLAG, l);
}
static int w_futex_waitv(int64_t l)
{
    struct {
        uint64_t val, uaddr;
        uint32_t flags, reserved;
    } waiter = {0, (uint64_t)(uintptr_t)&futex_word, 2 | FUTEX_PRIVATE_FLAG, 0};
    struct timespec ts = at(CLOCK_REALTIME, l);
    return expect_errno(syscall(SYS_futex_waitv, &waiter, 1L, 0L, &ts, (long)CLOCK_REALTIME),
                        ETIMEDOUT);
}

static sigset_t alarm_set(void)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    return set;
}
static int w_sigtimedwait(int64_t l)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    struct timespec ts = ts_of(l);
    return expect_errno(sigtimedwait(&set, NULL, &ts), EAGAIN);
}
static int w_syscall_sigtimedwait(int64_t l)
{
    uint64_t set = UINT64_C(1) << (SIGUSR2 - 1);
    struct timespec ts = ts_of(l);
    return expect_errno(syscall(SYS_rt_sigtimedwait, &set, NULL, &ts, 8L), EAGAIN);
}
static int w_semtimedop(int64_t l)
{
    int id = semget(IPC_PRIVATE, 1, 0600);
    struct sembuf take = {0, -1, 0};
    struct timespec ts = ts_of(l);
    int result = semtimedop(id, &take, 1, &ts), error = errno;
    semctl(id, 0, IPC_RMID);
    errno = error;
    return expect_errno(result, EAGAIN);
}
static int mq_wait(int sending, int64_t l)
{
    char name[64], byte[8] = {0};
    struct mq_attr attr = {.mq_maxmsg = 1, .mq_msgsize = 8};
    snprintf(name, sizeof name, "/clock-test-%d", getpid());
    mqd_t queue = mq_open(name, O_CREAT | O_RDWR, 0600, &attr);
    if (queue == (mqd_t)-1)
        return expect("mq_open", errno, 0);
    mq_unlink(name);
    if (sending)
        mq_send(queue, byte, 1, 0);
    struct timespec ts = at(CLOCK_REALTIME, l);
    ssize_t result = sending ? mq_timedsend(queue, byte, 1, 0, &ts)
                             : mq_timedreceive(queue, byte, 8, NULL, &ts);
    int error = errno;
    mq_close(queue);
    errno = error;
    return expect_errno(result, ETIMEDOUT);
}
static int w_mq_timedsend(int64_t l)
{
    return mq_wait(1, l);
}
static int w_mq_timedreceive(int64_t l)
{
    return mq_wait(0, l);
}

/* The kernel looks at this timeout only when a datagram arrives. */
static int datagrams[2];
static void *send_later(void *length)
{
    struct timespec ts = ts_of(*(int64_t *)length * 11 / 10);
    nanosleep(&ts, NULL);
    send(datagrams[0], "x", 1, 0);
    return NULL;
}
static int w_recvmmsg(int64_t l)
{
    pthread_t thread;
    char bytes[2];
    struct iovec vectors[2] = {{&bytes[0], 1}, {&bytes[1], 1}};
    struct mmsghdr messages[2] = {{.msg_hdr = {.msg_iov = &vectors[0], .msg_iovlen = 1}},
                                  {.msg_hdr = {.msg_iov = &vectors[1], .msg_iovlen = 1}}};
    struct timespec ts = ts_of(l);
    socketpair(AF_UNIX, SOCK_DGRAM, 0, datagrams);
    pthread_create(&thread, NULL, send_later, &l);
    int result = recvmmsg(datagrams[1], messages, 2, 0, &ts);
    pthread_join(thread, NULL);
    close(datagrams[0]);
    close(datagrams[1]);
    return expect("result", result, 1) || expect("left", ns_of(ts), 0);
}
static int w_socket_timeout(int64_t l)
{
    int pair[2];
    char byte;
    struct timeval tv = tv_of(l), back = {0};
    socklen_t size = sizeof back;
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof tv);
    getsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &back, &size);
    ssize_t result = recv(pair[0], &byte, 1, 0);
    int error = errno;
    close(pair[0]);
    close(pair[1]);
    errno = error;
    /* The kernel keeps whole ticks, which are at most 10 ms real. */
    int64_t kept = (int64_t)back.tv_sec * S + back.tv_usec * 1000;
    return expect_errno(result, EAGAIN) ||
           expect_between("kept", kept, l, l + (int64_t)(1e7 * get_rate()));
}
static int aio_wait(int wide, int64_t l)
{
    int ends[2];
    char byte;
    if (pipe(ends) != 0)
        return expect("pipe", errno, 0);
    struct aiocb request = {.aio_fildes = ends[0], .aio_buf = &byte, .aio_nbytes = 1};
    const struct aiocb *list[] = {&request};
    struct timespec ts = ts_of(l);
    aio_read(&request);
    int64_t start = now(CLOCK_MONOTONIC);
    int result = wide ? aio_suspend64((const struct aiocb64 *const *)(const void *)list, 1, &ts)
                      : aio_suspend(list, 1, &ts);
    int error = errno;
    int64_t took = now(CLOCK_MONOTONIC) - start;
    if (write(ends[1], "x", 1) != 1)
        return expect("write", errno, 0);
    while (aio_error(&request) == EINPROGRESS)
        aio_suspend(list, 1, NULL);
    close(ends[0]);
    close(ends[1]);
    errno = error;
    return expect_errno(result, EAGAIN) || expect_between("took", took, l, INT64_MAX);
}
static int w_aio_suspend(int64_t l)
{
    return aio_wait(0, l);
}
static int w_aio_suspend64(int64_t l)
{
    return aio_wait(1, l);
}
static int w_io_getevents(int64_t l)
{
    aio_context_t context = 0;
    struct io_event event;
    struct timespec ts = ts_of(l);
    if (syscall(SYS_io_setup, 1L, &context) != 0)
        return expect("io_setup", errno, 0);
    long result = syscall(SYS_io_getevents, context, 1L, 1L, &event, &ts);
    /* Not destroyed here: that takes longer than the wait. */
    return expect("result", result, 0);
}

static int timerfd_wait(clockid_t id, int absolute, int64_t l)
{
    uint64_t ticks;
    int fd = timerfd_create(id, 0);
    struct itimerspec value = {.it_value = absolute ? at(id, l) : ts_of(l)}, left;
    timerfd_settime(fd, absolute ? TFD_TIMER_ABSTIME : 0, &value, NULL);
    timerfd_gettime(fd, &left);
    ssize_t result = read(fd, &ticks, sizeof ticks);
    close(fd);
    return expect("read", result, sizeof ticks) || expect("ticks", (int64_t)ticks, 1) ||
           expect_between("left", ns_of(left.it_value), 1, l);
}
static int w_timerfd_relative(int64_t l)
{
    return timerfd_wait(CLOCK_MONOTONIC, 0, l);
}
static int w_timerfd_monotonic(int64_t l)
{
    return timerfd_wait(CLOCK_MONOTONIC, 1, l);
}
static int w_timerfd_realtime(int64_t l)
{
    return timerfd_wait(CLOCK_REALTIME, 1, l);
}
static int w_timerfd_interval(int64_t l)
{
    uint64_t ticks = 0, sum = 0;
    int fd = timerfd_create(CLOCK_MONOTONIC, 0);
    struct itimerspec value = {.it_value = ts_of(l / 4), .it_interval = ts_of(l / 4)};
    timerfd_settime(fd, 0, &value, NULL);
    while (sum < 4 && read(fd, &ticks, sizeof ticks) == sizeof ticks)
        sum += ticks;
    close(fd);
    return 0;
}
static int signal_arrives(void)
{
    sigset_t set = alarm_set();
    return expect("signal", sigwaitinfo(&set, NULL), SIGALRM);
}
static int w_setitimer(int64_t l)
{
    struct itimerval value = {.it_value = tv_of(l)}, left;
    setitimer(ITIMER_REAL, &value, NULL);
    getitimer(ITIMER_REAL, &left);
    return signal_arrives() ||
           expect_between("left", left.it_value.tv_sec * S + left.it_value.tv_usec * 1000, 1,
                          l + (int64_t)(1000 * get_rate()));
}
static int w_alarm(int64_t l)
{
    alarm((unsigned)(l / S) + 5);
    int64_t left = alarm((unsigned)(l / S));
    return signal_arrives() || expect_between("left", left, l / S + 1, l / S + 5);
}
static int w_ualarm(int64_t l)
{
    return ualarm((useconds_t)(l / 1000), 0) || signal_arrives();
}
static int posix_timer(clockid_t id, int absolute, int64_t l)
{
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    struct itimerspec value = {.it_value = absolute ? at(id, l) : ts_of(l)}, left;
    timer_create(id, &event, &timer);
    timer_settime(timer, absolute ? TIMER_ABSTIME : 0, &value, NULL);
    timer_gettime(timer, &left);
    int result = signal_arrives();
    timer_delete(timer);
    return result || expect_between("left", ns_of(left.it_value), 1, l);
}
static int w_timer_relative(int64_t l)
{
    return posix_timer(CLOCK_REALTIME, 0, l);
}
static int w_timer_monotonic(int64_t l)
{
    return posix_timer(CLOCK_MONOTONIC, 1, l);
}
static int w_timer_realtime(int64_t l)
{
    return posix_timer(CLOCK_REALTIME, 1, l);
}
static sem_t expired;
static void on_expiry(union sigval value)
{
    (void)value;
    sem_post(&expired);
}
static int w_timer_thread(int64_t l)
{
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_THREAD, .sigev_notify_function = on_expiry};
    struct itimerspec value = {.it_value = ts_of(l)};
    sem_init(&expired, 0, 0);
    timer_create(CLOCK_MONOTONIC, &event, &timer);
    timer_settime(timer, 0, &value, NULL);
    sem_wait(&expired);
    timer_delete(timer);
    return 0;
}
static int w_syscall_timer(int64_t l)
{
    int timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    struct itimerspec value = {.it_value = at(CLOCK_MONOTONIC, l)};
    syscall(SYS_timer_create, (long)CLOCK_MONOTONIC, &event, &timer);
    syscall(SYS_timer_settime, (long)timer, (long)TIMER_ABSTIME, &value, NULL);
    int result = signal_arrives();
    syscall(SYS_timer_delete, (long)timer);
    return result;
}

static const struct {
    const char *name;
    int (*run)(int64_t);
    int64_t unit, longest;
} waits[] = {
#define W(name) {#name, w_##name, 1, INT64_MAX}
    W(nanosleep), W(alias___nanosleep), W(alias___poll), W(alias___select),
    W(clock_nanosleep_relative), W(clock_nanosleep_monotonic),
    W(clock_nanosleep_realtime), W(clock_nanosleep_boottime), W(clock_nanosleep_tai), W(usleep),
    W(thrd_sleep), W(syscall_nanosleep), W(syscall_clock_nanosleep), W(poll), W(ppoll),
    W(poll_chk), W(ppoll_chk), W(select), W(select_many_us), W(pselect), W(epoll_wait),
    W(epoll_pwait), W(epoll_pwait2), W(syscall_poll), W(syscall_ppoll), W(syscall_select),
    W(syscall_pselect6), W(syscall_epoll_wait), W(syscall_epoll_pwait),
    W(cond_wait), W(cond_timedwait_realtime), W(cond_timedwait_monotonic), W(cond_timedwait_shared),
    W(cond_clockwait_realtime), W(cond_clockwait_monotonic), W(sem_timedwait), W(sem_clockwait),
    W(mutex_timedlock), W(mutex_clocklock), W(mutex_timedlock_inheriting),
    W(rwlock_timedrdlock), W(rwlock_timedwrlock), W(rwlock_clockrdlock), W(rwlock_clockwrlock),
    W(timedjoin), W(clockjoin), W(cnd_timedwait), W(mtx_timedlock), W(futex_wait),
    W(futex_bitset_monotonic), W(futex_bitset_realtime), W(futex_requeue_pi), W(futex_lock_pi),
    W(futex_lock_pi2), W(futex_waitv), W(sigtimedwait), W(syscall_sigtimedwait), W(semtimedop),
    W(mq_timedsend), W(mq_timedreceive), W(recvmmsg), W(socket_timeout), W(aio_suspend), W(aio_suspend64),
    W(io_getevents), W(timerfd_relative), W(timerfd_monotonic), W(timerfd_realtime),
    W(timerfd_interval), W(setitimer), W(timer_relative), W(timer_monotonic),
    W(timer_realtime), W(timer_thread), W(syscall_timer),
#undef W
    {"sleep", w_sleep, S, INT64_MAX}, {"alarm", w_alarm, S, INT64_MAX},
    {"ualarm", w_ualarm, 1000, 999999000},
};

static int wanted(const char *name, int argc, char **argv)
{
    for (int i = 0; i < argc; i++)
        if (strcmp(argv[i], name) == 0)
            return 1;
    return argc == 0;
}

static void run_waits(int64_t length, int argc, char **argv)
{
    for (size_t i = 0; i < sizeof waits / sizeof waits[0]; i++) {
        if (!wanted(waits[i].name, argc, argv))
            continue;
        int64_t l = length < waits[i].longest ? length : waits[i].longest;
        l = l < waits[i].unit ? waits[i].unit : l / waits[i].unit * waits[i].unit;
        fault[0] = '\0';
        int64_t v0 = now(CLOCK_MONOTONIC), r0 = real_ns(CLOCK_MONOTONIC);
        int result = waits[i].run(l);
        int64_t r1 = real_ns(CLOCK_MONOTONIC), v1 = now(CLOCK_MONOTONIC);
        printf("%s %" PRId64 " %" PRId64 " %" PRId64 " %s\n", waits[i].name, l, v1 - v0, r1 - r0,
               result == 0 ? "ok" : fault);
        fflush(stdout);
    }
}

/* ---------------------------------------------------------------- edges -- */

/* Nothing here may take this long in real time. */
#define SOON (S / 2)
#define HUGE_TIME ((struct timespec){INT64_MAX, 999999999})
#define SPOILT ((struct timespec){1, 1000000000})

static int waker_pipe[2];
static pthread_cond_t waker_cond = PTHREAD_COND_INITIALIZER;
static sem_t waker_sem;
static pthread_t waker_target;

/* Ends an endless wait after 5 real milliseconds. */
static void *waker(void *unused)
{
    (void)unused;
    struct timespec ts = ts_of((int64_t)(5e6 * get_rate()) + 1);
    nanosleep(&ts, NULL);
    if (write(waker_pipe[1], "x", 1) != 1)
        abort();
    pthread_mutex_lock(&mutex);
    pthread_cond_signal(&waker_cond);
    pthread_mutex_unlock(&mutex);
    sem_post(&waker_sem);
    pthread_kill(waker_target, SIGUSR1);
    return NULL;
}
static void nothing(int number)
{
    (void)number;
}
static pthread_t start_waker(void)
{
    pthread_t thread;
    waker_target = pthread_self();
    sem_init(&waker_sem, 0, 0);
    if (pipe(waker_pipe) != 0)
        abort();
    pthread_create(&thread, NULL, waker, NULL);
    return thread;
}
static void end_waker(pthread_t thread)
{
    pthread_join(thread, NULL);
    close(waker_pipe[0]);
    close(waker_pipe[1]);
}

static int woken_cond(struct timespec deadline)
{
    pthread_mutex_lock(&mutex);
    pthread_t thread = start_waker();
    int result = pthread_cond_timedwait(&waker_cond, &mutex, &deadline);
    pthread_mutex_unlock(&mutex);
    end_waker(thread);
    return expect("result", result, 0);
}
static int e_cond_forever(void)
{
    return woken_cond(HUGE_TIME);
}
static int e_cond_time_point_max(void)
{
    return woken_cond(ts_of(INT64_MAX));
}
static int e_cond_ten_thousand_hours(void)
{
    return woken_cond(at(CLOCK_REALTIME, 10000 * 3600 * S));
}
static int e_cond_past(void)
{
    struct timespec long_ago = {1, 0}, recently = at(CLOCK_REALTIME, -1);
    pthread_mutex_lock(&mutex);
    int first = pthread_cond_timedwait(&waker_cond, &mutex, &long_ago);
    int second = pthread_cond_timedwait(&waker_cond, &mutex, &recently);
    struct timespec negative = {-1, 0};
    int third = pthread_cond_timedwait(&waker_cond, &mutex, &negative);
    pthread_mutex_unlock(&mutex);
    return expect("long ago", first, ETIMEDOUT) || expect("recently", second, ETIMEDOUT) ||
           expect("negative", third, ETIMEDOUT);
}
static int e_cond_invalid(void)
{
    struct timespec ts = SPOILT;
    pthread_mutex_lock(&mutex);
    int result = pthread_cond_timedwait(&waker_cond, &mutex, &ts);
    int other = pthread_cond_clockwait(&waker_cond, &mutex, CLOCK_PROCESS_CPUTIME_ID, &ts);
    pthread_mutex_unlock(&mutex);
    return expect("nanoseconds", result, EINVAL) || expect("clock", other, EINVAL);
}
static int e_sem_forever(void)
{
    struct timespec ts = HUGE_TIME;
    pthread_t thread = start_waker();
    int result;
    while ((result = sem_timedwait(&waker_sem, &ts)) != 0 && errno == EINTR)
        ;
    end_waker(thread);
    return expect("result", result, 0);
}
static int e_sem_invalid_and_past(void)
{
    sem_t sem;
    struct timespec ts = SPOILT, past = {1, 0};
    sem_init(&sem, 0, 0);
    int result = expect_errno(sem_timedwait(&sem, &ts), EINVAL) ||
                 expect_errno(sem_timedwait(&sem, &past), ETIMEDOUT);
    sem_post(&sem);
    return result || expect("available", sem_timedwait(&sem, &past), 0);
}
static int e_poll_infinite(void)
{
    pthread_t thread = start_waker();
    struct pollfd fd = {.fd = waker_pipe[0], .events = POLLIN};
    int result = poll(&fd, 1, -1);
    end_waker(thread);
    return expect("result", result, 1);
}
static int e_poll_longest(void)
{
    pthread_t thread = start_waker();
    struct pollfd fd = {.fd = waker_pipe[0], .events = POLLIN};
    int result = poll(&fd, 1, INT_MAX);
    end_waker(thread);
    return expect("result", result, 1);
}
static int e_poll_zero(void)
{
    struct timespec zero = {0, 0};
    return expect("poll", poll(NULL, 0, 0), 0) ||
           expect("ppoll", ppoll(NULL, 0, &zero, NULL), 0);
}
static int e_ppoll_forever(void)
{
    struct timespec ts = HUGE_TIME;
    pthread_t thread = start_waker();
    struct pollfd fd = {.fd = waker_pipe[0], .events = POLLIN};
    int result = ppoll(&fd, 1, &ts, NULL);
    end_waker(thread);
    return expect("result", result, 1);
}
static int e_ppoll_invalid(void)
{
    struct timespec ts = SPOILT, negative = {-1, 0};
    return expect_errno(ppoll(NULL, 0, &ts, NULL), EINVAL) ||
           expect_errno(ppoll(NULL, 0, &negative, NULL), EINVAL) ||
           expect_errno(pselect(0, NULL, NULL, NULL, &ts, NULL), EINVAL);
}
static int e_select_edges(void)
{
    struct timeval negative = {-1, 0}, zero = {0, 0}, endless = {INT64_MAX, 999999};
    if (expect_errno(select(0, NULL, NULL, NULL, &negative), EINVAL) ||
        expect("zero", select(0, NULL, NULL, NULL, &zero), 0))
        return -1;
    pthread_t thread = start_waker();
    fd_set set;
    FD_ZERO(&set);
    FD_SET(waker_pipe[0], &set);
    int result = select(waker_pipe[0] + 1, &set, NULL, NULL, &endless);
    end_waker(thread);
    return expect("endless", result, 1);
}
static int e_select_writes_back(void)
{
    struct timeval tv = {1000, 0};
    pthread_t thread = start_waker();
    fd_set set;
    FD_ZERO(&set);
    FD_SET(waker_pipe[0], &set);
    int result = select(waker_pipe[0] + 1, &set, NULL, NULL, &tv);
    end_waker(thread);
    return expect("result", result, 1) ||
           expect_between("left", tv.tv_sec * S + tv.tv_usec * 1000,
                          1000 * S - (int64_t)(0.4e9 * get_rate()),
                          1000 * S - (int64_t)(5e6 * get_rate()));
}
static int e_epoll_edges(void)
{
    struct epoll_event event = {.events = EPOLLIN};
    struct timespec spoilt = SPOILT;
    int fd = epoll_create1(0);
    pthread_t thread = start_waker();
    epoll_ctl(fd, EPOLL_CTL_ADD, waker_pipe[0], &event);
    int zero = epoll_wait(fd, &event, 1, 0);
    int infinite = epoll_wait(fd, &event, 1, -1);
    int invalid = epoll_pwait2(fd, &event, 1, &spoilt, NULL), error = errno;
    end_waker(thread);
    close(fd);
    errno = error;
    return expect("zero", zero, 0) || expect("infinite", infinite, 1) ||
           expect_errno(invalid, EINVAL) ||
           expect_errno(epoll_wait(-1, &event, 1, 1000), EBADF);
}
static int e_nanosleep_invalid(void)
{
    struct timespec spoilt = SPOILT, negative = {-1, 0}, below = {0, -1}, zero = {0, 0};
    return expect_errno(nanosleep(&spoilt, NULL), EINVAL) ||
           expect_errno(nanosleep(&negative, NULL), EINVAL) ||
           expect_errno(nanosleep(&below, NULL), EINVAL) ||
           expect("zero", nanosleep(&zero, NULL), 0) ||
           expect("clock", clock_nanosleep(999, 0, &zero, NULL), EINVAL) ||
           expect("clock_nanosleep", clock_nanosleep(CLOCK_MONOTONIC, 0, &spoilt, NULL), EINVAL);
}
static int e_nanosleep_forever_interrupted(void)
{
    struct timespec ts = HUGE_TIME, left = {0, 0};
    pthread_t thread = start_waker();
    int result = nanosleep(&ts, &left), error = errno;
    end_waker(thread);
    errno = error;
    return expect_errno(result, EINTR) ||
           expect_between("left", left.tv_sec, 1000000000, INT64_MAX);
}
static int interrupted_left(int (*sleeper)(const struct timespec *, struct timespec *))
{
    struct timespec ts = {1000, 0}, left = {0, 0};
    int64_t most = 1000 * S - (int64_t)(5e6 * get_rate());
    int result = 0;
    /* On a busy machine the signal may come as soon as the sleep has begun: then once more. */
    for (int tries = 0; tries < 20 && (tries == 0 || ns_of(left) > most); tries++) {
        pthread_t thread = start_waker();
        result = sleeper(&ts, &left);
        end_waker(thread);
    }
    return expect("interrupted", result, 1) ||
           expect_between("left", ns_of(left), 1000 * S - (int64_t)(0.4e9 * get_rate()), most);
}
static int by_nanosleep(const struct timespec *ts, struct timespec *left)
{
    return nanosleep(ts, left) == -1 && errno == EINTR;
}
static int by_clock_nanosleep(const struct timespec *ts, struct timespec *left)
{
    return clock_nanosleep(CLOCK_MONOTONIC, 0, ts, left) == EINTR;
}
static int by_thrd_sleep(const struct timespec *ts, struct timespec *left)
{
    return thrd_sleep(ts, left) == -1;
}
static int by_syscall(const struct timespec *ts, struct timespec *left)
{
    return syscall(SYS_nanosleep, ts, left) == -1 && errno == EINTR;
}
static int e_nanosleep_left(void)
{
    return interrupted_left(by_nanosleep);
}
static int e_clock_nanosleep_left(void)
{
    return interrupted_left(by_clock_nanosleep);
}
static int e_thrd_sleep_left(void)
{
    return interrupted_left(by_thrd_sleep);
}
static int e_syscall_nanosleep_left(void)
{
    return interrupted_left(by_syscall);
}
static int e_sleep_left(void)
{
    pthread_t thread = start_waker();
    unsigned left = sleep(1000);
    end_waker(thread);
    return expect_between("left", left, 1000 - (int64_t)(0.4 * get_rate() + 1), 1000);
}
static int e_clock_nanosleep_past(void)
{
    struct timespec past = {1, 0};
    return expect("result", clock_nanosleep(CLOCK_REALTIME, TIMER_ABSTIME, &past, NULL), 0) ||
           expect("result", clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &past, NULL), 0);
}
static int e_clock_invalid(void)
{
    struct timespec ts;
    return expect_errno(clock_gettime(999, &ts), EINVAL) ||
           expect_errno(clock_gettime(10, &ts), EINVAL);
}
static int e_futex_edges(void)
{
    struct timespec past = {1, 0}, spoilt = SPOILT;
    int word = 1;
    return expect_errno(syscall(SYS_futex, &word, (long)FUTEX_WAIT_BITSET_PRIVATE, 1L, &past, NULL,
                                (long)FUTEX_BITSET_MATCH_ANY),
                        ETIMEDOUT) ||
           expect_errno(syscall(SYS_futex, &word, (long)FUTEX_WAIT_PRIVATE, 1L, &spoilt, NULL, 0L),
                        EINVAL) ||
           expect_errno(syscall(SYS_futex, &word, (long)FUTEX_WAIT_PRIVATE, 2L, NULL, NULL, 0L),
                        EAGAIN) ||
           /* Here the fourth argument is a count, not a timeout. */
           expect("requeue", syscall(SYS_futex, &word, (long)FUTEX_CMP_REQUEUE_PRIVATE, 1L, 1L,
                                     &futex_word, 1L), 0);
}
static int e_timerfd_edges(void)
{
    struct itimerspec value = {.it_value = {1000, 0}}, off = {0}, old, spoilt = {.it_value = SPOILT};
    struct itimerspec past = {.it_value = {1, 0}};
    uint64_t ticks = 0;
    int fd = timerfd_create(CLOCK_REALTIME, TFD_NONBLOCK);
    timerfd_settime(fd, 0, &value, NULL);
    int result = expect_errno(timerfd_settime(fd, 0, &spoilt, NULL), EINVAL) ||
                 expect("disarm", timerfd_settime(fd, 0, &off, &old), 0) ||
                 expect_between("old", ns_of(old.it_value), S, 1000 * S) ||
                 expect("past", timerfd_settime(fd, TFD_TIMER_ABSTIME, &past, NULL), 0);
    usleep((useconds_t)(1000 * get_rate()) + 1);
    if (!result)
        result = expect("read", read(fd, &ticks, sizeof ticks), sizeof ticks);
    close(fd);
    return result || expect_errno(timerfd_settime(fd, TFD_TIMER_ABSTIME, &past, NULL), EBADF);
}
static int e_timer_edges(void)
{
    struct itimerval off = {0}, old, invalid = {.it_value = {0, 1000000}};
    struct itimerval set = {.it_value = {1000, 0}, .it_interval = {500, 0}};
    setitimer(ITIMER_REAL, &set, NULL);
    return expect_errno(setitimer(ITIMER_REAL, &invalid, NULL), EINVAL) ||
           expect("disarm", setitimer(ITIMER_REAL, &off, &old), 0) ||
           expect_between("old", old.it_value.tv_sec, 1000 - (int64_t)(0.4 * get_rate()) - 1, 1000) ||
           expect_between("interval", old.it_interval.tv_sec * 1000000 + old.it_interval.tv_usec,
                          500000000, 500000000 + (int64_t)get_rate() + 1) ||
           expect("alarm", alarm(0), 0);
}
static int e_cpu_timer_untouched(void)
{
    struct itimerval set = {.it_value = {1000, 0}}, back, off = {0};
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_NONE};
    struct itimerspec value = {.it_value = {1000, 0}}, left;
    setitimer(ITIMER_PROF, &set, NULL);
    getitimer(ITIMER_PROF, &back);
    setitimer(ITIMER_PROF, &off, NULL);
    timer_create(CLOCK_PROCESS_CPUTIME_ID, &event, &timer);
    timer_settime(timer, 0, &value, NULL);
    timer_gettime(timer, &left);
    timer_delete(timer);
    return expect_between("itimer", back.it_value.tv_sec, 998, 1001) ||
           expect_between("timer", left.it_value.tv_sec, 998, 1001);
}
static int e_clock_not_set(void)
{
    struct timespec ts = at(CLOCK_REALTIME, 0);
    struct timeval tv = {ts.tv_sec, 0};
    return expect_errno(clock_settime(CLOCK_REALTIME, &ts), EPERM) ||
           expect_errno(settimeofday(&tv, NULL), EPERM) ||
           expect_errno(syscall(SYS_clock_settime, (long)CLOCK_REALTIME, &ts), EPERM);
}
static int e_many_timers_fail_closed(void)
{
    timer_t made[300];
    int n = 0;
    struct sigevent event = {.sigev_notify = SIGEV_NONE};
    while (n < 300 && timer_create(CLOCK_MONOTONIC, &event, &made[n]) == 0)
        n++;
    int error = errno;
    for (int i = 0; i < n; i++)
        timer_delete(made[i]);
    int again = timer_create(CLOCK_MONOTONIC, &event, &made[0]);
    timer_delete(made[0]);
    return expect("made", n, 256) || expect("errno", error, EAGAIN) || expect("again", again, 0);
}
static int e_recvmmsg_left(void)
{
    int pair[2];
    char byte;
    struct iovec vector = {&byte, 1};
    struct mmsghdr message = {.msg_hdr = {.msg_iov = &vector, .msg_iovlen = 1}};
    struct timespec ts = {1000, 0};
    socketpair(AF_UNIX, SOCK_DGRAM, 0, pair);
    send(pair[0], "x", 1, 0);
    int result = recvmmsg(pair[1], &message, 1, 0, &ts);
    close(pair[0]);
    close(pair[1]);
    return expect("result", result, 1) || expect_between("left", ts.tv_sec, 800, 1000);
}
static int e_rates_refused(void)
{
    double before = get_rate();
    return expect("zero", set_rate(0), -1) || expect("negative", set_rate(-1), -1) ||
           expect("nan", set_rate(__builtin_nan("")), -1) ||
           expect("infinite", set_rate(__builtin_inf()), -1) ||
           expect("large", set_rate(1.1e6), -1) || expect("small", set_rate(1e-7), -1) ||
           expect("kept", before == get_rate(), 1);
}

static const struct {
    const char *name;
    int (*run)(void);
} edges[] = {
#define E(name) {#name, e_##name}
    E(cond_forever), E(cond_time_point_max), E(cond_ten_thousand_hours), E(cond_past),
    E(cond_invalid), E(sem_forever), E(sem_invalid_and_past), E(poll_infinite), E(poll_longest),
    E(poll_zero), E(ppoll_forever), E(ppoll_invalid), E(select_edges), E(select_writes_back),
    E(epoll_edges), E(nanosleep_invalid), E(nanosleep_forever_interrupted), E(nanosleep_left),
    E(clock_nanosleep_left), E(thrd_sleep_left), E(syscall_nanosleep_left), E(sleep_left),
    E(clock_nanosleep_past), E(clock_invalid), E(futex_edges), E(timerfd_edges), E(timer_edges),
    E(cpu_timer_untouched), E(clock_not_set), E(many_timers_fail_closed), E(recvmmsg_left),
    E(rates_refused),
#undef E
};

static void run_edges(void)
{
    sigset_t set;
    /* Only the sleeps that are to be interrupted see the waker's signal. */
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGUSR1, &action, NULL);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);
    for (size_t i = 0; i < sizeof edges / sizeof edges[0]; i++) {
        int interrupted = strstr(edges[i].name, "_left") || strstr(edges[i].name, "interrupted");
        pthread_sigmask(interrupted ? SIG_UNBLOCK : SIG_BLOCK, &set, NULL);
        fault[0] = '\0';
        int64_t start = real_ns(CLOCK_MONOTONIC);
        int result = edges[i].run();
        int64_t took = real_ns(CLOCK_MONOTONIC) - start;
        if (result == 0)
            result = expect_between("took", took, 0, SOON);
        printf("%s %s\n", edges[i].name, result == 0 ? "ok" : fault);
        fflush(stdout);
    }
}

/* ---------------------------------------------------------------- reads -- */

static int64_t v_syscall(void)
{
    struct timespec ts;
    syscall(SYS_clock_gettime, (long)CLOCK_MONOTONIC, &ts);
    return ns_of(ts);
}
static int64_t v_gettimeofday(void)
{
    struct timeval tv;
    gettimeofday(&tv, NULL);
    return (int64_t)tv.tv_sec * S + tv.tv_usec * 1000;
}
static int64_t v_syscall_gettimeofday(void)
{
    struct timeval tv;
    syscall(SYS_gettimeofday, &tv, NULL);
    return (int64_t)tv.tv_sec * S + tv.tv_usec * 1000;
}
static int64_t v_time(void)
{
    return (int64_t)time(NULL) * S;
}
static int64_t v_timespec_get(void)
{
    struct timespec ts;
    return timespec_get(&ts, TIME_UTC) == TIME_UTC ? ns_of(ts) : -1;
}
static int64_t v_times(void)
{
    struct tms buffer;
    return (int64_t)times(&buffer) * (S / sysconf(_SC_CLK_TCK));
}
static int64_t v_sysinfo(void)
{
    struct sysinfo info;
    sysinfo(&info);
    return (int64_t)info.uptime * S;
}
static int64_t v_alias___clock_gettime(void)
{
    struct timespec ts;
    int (*call)(clockid_t, struct timespec *);
    *(void **)&call = symbol("__clock_gettime");
    call(CLOCK_MONOTONIC, &ts);
    return ns_of(ts);
}
static int64_t v_alias___gettimeofday(void)
{
    struct timeval tv;
    int (*call)(struct timeval *, void *);
    *(void **)&call = symbol("__gettimeofday");
    call(&tv, NULL);
    return (int64_t)tv.tv_sec * S + tv.tv_usec * 1000;
}
static int64_t v_ftime(void)
{
    struct {
        time_t time;
        unsigned short millitm;
        short timezone, dstflag;
    } out;
    int (*call)(void *);
    *(void **)&call = symbol("ftime");
    call(&out);
    return (int64_t)out.time * S + out.millitm * 1000000;
}
#define V_CLOCK(name, id)             \
    static int64_t v_##name(void)     \
    {                                 \
        return now(id);               \
    }
V_CLOCK(realtime, CLOCK_REALTIME)
V_CLOCK(monotonic, CLOCK_MONOTONIC)
V_CLOCK(monotonic_raw, CLOCK_MONOTONIC_RAW)
V_CLOCK(realtime_coarse, CLOCK_REALTIME_COARSE)
V_CLOCK(monotonic_coarse, CLOCK_MONOTONIC_COARSE)
V_CLOCK(boottime, CLOCK_BOOTTIME)
V_CLOCK(tai, CLOCK_TAI)

static const struct {
    const char *name;
    int64_t (*read)(void);
    int64_t resolution;
} reads[] = {
#define V(name, resolution) {#name, v_##name, resolution}
    V(realtime, 1), V(monotonic, 1), V(monotonic_raw, 1), V(realtime_coarse, 2),
    V(monotonic_coarse, 2), V(boottime, 1), V(tai, 1), V(syscall, 1), V(gettimeofday, 1000),
    V(syscall_gettimeofday, 1000), V(timespec_get, 1), V(alias___clock_gettime, 1),
    V(alias___gettimeofday, 1000), V(ftime, 1000000), V(time, S),
    V(times, 10000000), V(sysinfo, S),
#undef V
};

/* Each clock goes on from where it is at the change, then runs at the rate. */
static void run_reads(double rate)
{
    enum { N = sizeof reads / sizeof reads[0] };
    int64_t before[N], after[N], v0[N], v1[N], r0, r1, r2, r3;
    for (int i = 0; i < N; i++)
        before[i] = reads[i].read();
    r0 = real_ns(CLOCK_MONOTONIC);
    set_rate(rate);
    for (int i = 0; i < N; i++)
        after[i] = reads[i].read();
    r1 = real_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < N; i++)
        v0[i] = reads[i].read();
    r2 = real_ns(CLOCK_MONOTONIC);
    struct timespec cpu0, cpu1, ts = ts_of((int64_t)(4e7 * rate));
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu0);
    nanosleep(&ts, NULL);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu1);
    r3 = real_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < N; i++)
        v1[i] = reads[i].read();
    int64_t r4 = real_ns(CLOCK_MONOTONIC);
    for (int i = 0; i < N; i++) {
        int64_t unit = reads[i].resolution > 1 ? reads[i].resolution + 20000000 : 0;
        fault[0] = '\0';
        int bad = expect_between("jump", after[i] - before[i], -unit,
                                 (int64_t)((double)(r1 - r0 + 5000000) *
                                           (rate > 1 ? rate : 1)) + unit) ||
                  expect_between("elapsed", v1[i] - v0[i],
                                 (int64_t)((double)(r3 - r2) * rate) - unit,
                                 (int64_t)((double)(r4 - r1) * rate * 1.0001) + unit);
        printf("%s %s\n", reads[i].name, bad ? fault : "ok");
    }
    fault[0] = '\0';
    int bad = expect_between("elapsed", ns_of(cpu1) - ns_of(cpu0), 0, r3 - r2);
    printf("cpu_time_untouched %s\n", bad ? fault : "ok");
}

/* ----------------------------------------------------------------- cost -- */

static double cost_of(int (*read)(clockid_t, struct timespec *), clockid_t id, int rounds)
{
    double best = 1e9;
    struct timespec ts;
    for (int repeat = 0; repeat < 30; repeat++) {
        int64_t start = real_ns(CLOCK_MONOTONIC);
        for (int i = 0; i < rounds; i++)
            read(id, &ts);
        double each = (double)(real_ns(CLOCK_MONOTONIC) - start) / rounds;
        best = each < best ? each : best;
    }
    return best;
}

static void run_cost(int rounds)
{
    static const struct {
        const char *name;
        clockid_t id;
    } clocks[] = {{"CLOCK_MONOTONIC", CLOCK_MONOTONIC},
                  {"CLOCK_REALTIME", CLOCK_REALTIME},
                  {"CLOCK_MONOTONIC_COARSE", CLOCK_MONOTONIC_COARSE}};
    void *libc = dlopen("libc.so.6", RTLD_NOLOAD | RTLD_NOW);
    int (*real)(clockid_t, struct timespec *) =
        (int (*)(clockid_t, struct timespec *))dlsym(libc, "clock_gettime");
    for (size_t i = 0; i < sizeof clocks / sizeof clocks[0]; i++)
        printf("%s %.2f %.2f\n", clocks[i].name, cost_of(clock_gettime, clocks[i].id, rounds),
               cost_of(real, clocks[i].id, rounds));
}

/* -------------------------------------------------------------- forward -- */

static atomic_int stop;
static atomic_long backwards, total;
/* The latest reading by any thread: a clock must not run backwards between
   threads either. */
static _Atomic int64_t latest[4];

static void *read_forward(void *unused)
{
    static const clockid_t ids[4] = {CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_BOOTTIME,
                                     CLOCK_REALTIME};
    (void)unused;
    while (!atomic_load(&stop))
        for (int i = 0; i < 4; i++) {
            int64_t before = atomic_load(&latest[i]);
            int64_t t = now(ids[i]);
            if (t < before)
                atomic_fetch_add(&backwards, 1);
            while (t > before && !atomic_compare_exchange_weak(&latest[i], &before, t))
                ;
            atomic_fetch_add(&total, 1);
        }
    return NULL;
}

static atomic_int changes;

static void *change_rates(void *unused)
{
    static const double rates[] = {100, 1, 1000, 0.5, 37.3, 10000, 1, 1e-3, 3};
    (void)unused;
    while (!atomic_load(&stop))
        set_rate(rates[atomic_fetch_add(&changes, 1) % 9]);
    return NULL;
}

/* A fork during a change has to leave the child a clock that it can read. */
static int child_reads_forward(void)
{
    pid_t child = fork();
    if (child == 0)
        _exit(now(CLOCK_MONOTONIC) < atomic_load(&latest[0]));
    int status = -1;
    int64_t end = real_ns(CLOCK_MONOTONIC) + 5 * S;
    while (waitpid(child, &status, WNOHANG) == 0)
        if (real_ns(CLOCK_MONOTONIC) > end) {
            kill(child, SIGKILL);
            waitpid(child, &status, 0);
            break;
        }
    return status == 0;
}

static void run_forward(void)
{
    pthread_t threads[4];
    set_rate(1);
    pthread_create(&threads[0], NULL, change_rates, NULL);
    for (int i = 1; i < 4; i++)
        pthread_create(&threads[i], NULL, read_forward, NULL);
    int forks = 0;
    int64_t end = real_ns(CLOCK_MONOTONIC) + S;
    while (real_ns(CLOCK_MONOTONIC) < end && forks++ < 1000)
        if (!child_reads_forward()) {
            atomic_fetch_add(&backwards, 1);
            break;
        }
    while (real_ns(CLOCK_MONOTONIC) < end)
        ;
    atomic_store(&stop, 1);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    printf("%ld %d %ld %d\n", (long)backwards, (int)changes, (long)total, forks);
}

/* ----------------------------------------------------------------- exec -- */

extern char **environ;

static void run_origin(void)
{
    int64_t r = real_ns(CLOCK_MONOTONIC), v = now(CLOCK_MONOTONIC);
    printf("%.17g %" PRId64 " %" PRId64 "\n", get_rate(), v, r);
    fflush(stdout);
}

static void run_exec(char *self, const char *how)
{
    char *argv[] = {self, "origin", NULL};
    char preload[4096], path[4096], *own_env[3] = {preload, path, NULL};
    const char *library_path = getenv("LD_LIBRARY_PATH");
    snprintf(preload, sizeof preload, "LD_PRELOAD=%s", getenv("LD_PRELOAD"));
    snprintf(path, sizeof path, "LD_LIBRARY_PATH=%s", library_path ? library_path : "");
    pid_t pid;
    run_origin();
    if (strcmp(how, "execve") == 0)
        execve(self, argv, own_env);
    else if (strcmp(how, "execv") == 0)
        execv(self, argv);
    else if (strcmp(how, "execvp") == 0)
        execvp(self, argv);
    else if (strcmp(how, "execvpe") == 0)
        execvpe(self, argv, own_env);
    else if (strcmp(how, "execl") == 0)
        execl(self, self, "origin", NULL);
    else if (strcmp(how, "fexecve") == 0)
        fexecve(open(self, O_RDONLY), argv, own_env);
    else if (strcmp(how, "execveat") == 0)
        execveat(AT_FDCWD, self, argv, own_env, 0);
    else if (strcmp(how, "syscall") == 0)
        syscall(SYS_execve, self, argv, own_env);
    else if (strcmp(how, "vfork") == 0) {
        if ((pid = vfork()) == 0) {
            execve(self, argv, own_env);
            _exit(1);
        }
        waitpid(pid, NULL, 0);
    } else if (strcmp(how, "posix_spawn") == 0 &&
               posix_spawn(&pid, self, NULL, NULL, argv, own_env) == 0)
        waitpid(pid, NULL, 0);
    else if (strcmp(how, "posix_spawnp") == 0 &&
             posix_spawnp(&pid, self, NULL, NULL, argv, own_env) == 0)
        waitpid(pid, NULL, 0);
    else if (strcmp(how, "system") == 0) {
        char command[5000];
        snprintf(command, sizeof command, "'%s' origin", self);
        if (system(command) != 0)
            exit(1);
    }
}

int main(int argc, char **argv)
{
    *(void **)&set_rate = dlsym(RTLD_DEFAULT, "rpcprops_clock_set_rate");
    *(void **)&get_rate = dlsym(RTLD_DEFAULT, "rpcprops_clock_get_rate");
    *(void **)&real_ns = dlsym(RTLD_DEFAULT, "rpcprops_clock_real_ns");
    if (!set_rate || argc < 2) {
        fprintf(stderr, "the clock library is not loaded\n");
        return 2;
    }
    const char *mode = argv[1];
    sigset_t set = alarm_set();
    sigprocmask(SIG_BLOCK, &set, NULL);
    double rate = argc > 2 ? atof(argv[2]) : 1;

    if (strcmp(mode, "origin") == 0)
        run_origin();
    else if (strcmp(mode, "forward") == 0)
        run_forward();
    else if (strcmp(mode, "reads") == 0)
        run_reads(rate);
    else if (strcmp(mode, "exec") == 0) {
        set_rate(100);
        run_exec(argv[0], argv[2]);
    } else if (set_rate(rate) != 0)
        return 3;
    else if (strcmp(mode, "waits") == 0)
        run_waits(atoll(argv[3]), argc - 4, argv + 4);
    else if (strcmp(mode, "edges") == 0)
        run_edges();
    else if (strcmp(mode, "cost") == 0)
        run_cost(atoi(argv[3]));
    return 0;
}
