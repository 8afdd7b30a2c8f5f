/*
 * What torch's faulty agent sends in one process, counted by message type.
 *
 * This is the second half of the preload library; _preload.c is the clock.  It
 * stands in front of four member functions of libtorch_cpu.so.  torch calls
 * them by name (through its PLT, and through the vtable of the agent), so the
 * dynamic linker finds those of a preloaded library first.  Each one here calls
 * torch's own.  A process that has no such agent never comes here.
 *
 * The order of calls is that of FaultyTensorPipeAgent::send
 * (torch/csrc/distributed/rpc/testing/faulty_tensorpipe_agent.cpp): it asks
 * shouldFailMessage for the type of the message.  It calls TensorPipeAgent::send
 * unless it fails the send.  That calls pipeWrite, which asks
 * getDelayForMessage and sleeps.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

/* message.h: the type of a message is its low byte; the bits above it say
   whether it is a request or a response. */
#define TYPES 256
#define TYPE_OF(number) ((unsigned)(number) % TYPES)

EXPORT int rpcprops_sends_probe(void);
EXPORT const char *rpcprops_sends_name(int index);
EXPORT void rpcprops_sends_counts(int64_t *sent, int64_t *failed, int64_t *delayed);

/* ------------------------------------------------------------------------ */
/* torch's functions                                                        */
/* ------------------------------------------------------------------------ */

/* The arguments of both functions `send`, as the C++ ABI passes them: what is
   returned, and the message, are intrusive_ptr objects, passed by address. */
#define SEND_ARGUMENTS \
    void *result, void *self, const void *to, void **message, float timeout, const void *devices
typedef void *send_function(SEND_ARGUMENTS);
typedef bool should_fail_function(const void *self, int type);
typedef float delay_function(const void *self, int type);

#define RPC "5torch11distributed3rpc"
#define FAULTY RPC "21FaultyTensorPipeAgent"
#define SEND                                                                               \
    "4sendERKNS1_10WorkerInfoEN3c1013intrusive_ptrINS1_7MessageENS6_6detail34intrusive_"   \
    "target_default_null_typeIS8_EEEEfRKSt13unordered_mapINS6_6DeviceESE_St4hashISE_ESt8"  \
    "equal_toISE_ESaISt4pairIKSE_SE_EEE"
#define SEND_NAME "_ZN" FAULTY SEND
#define BASE_SEND_NAME "_ZN" RPC "15TensorPipeAgent" SEND
#define SHOULD_FAIL_NAME "_ZNK" FAULTY "17shouldFailMessageENS1_11MessageTypeE"
#define DELAY_NAME "_ZNK" FAULTY "18getDelayForMessageENS1_11MessageTypeE"

EXPORT send_function faulty_send __asm__(SEND_NAME);
EXPORT send_function base_send __asm__(BASE_SEND_NAME);
EXPORT should_fail_function should_fail __asm__(SHOULD_FAIL_NAME);
EXPORT delay_function delay_of __asm__(DELAY_NAME);

enum { FAULTY_SEND, BASE_SEND, SHOULD_FAIL, DELAY, FUNCTIONS };

static struct {
    const char *name;
    void *_Atomic real;
} functions[FUNCTIONS] = {
    [FAULTY_SEND] = {SEND_NAME, NULL},
    [BASE_SEND] = {BASE_SEND_NAME, NULL},
    [SHOULD_FAIL] = {SHOULD_FAIL_NAME, NULL},
    [DELAY] = {DELAY_NAME, NULL},
};

#define LIBRARY "libtorch_cpu.so"

/* Python loads torch with dlopen(), so RTLD_NEXT does not find it. */
static void *torch_handle(const void *caller)
{
    void *handle = dlopen(LIBRARY, RTLD_NOLOAD | RTLD_LAZY);
    Dl_info info;
    if (!handle && caller && dladdr(caller, &info))
        handle = dlopen(info.dli_fname, RTLD_NOLOAD | RTLD_LAZY);
    return handle;
}

static void *real_function(int index, const void *caller)
{
    void *found = atomic_load_explicit(&functions[index].real, memory_order_acquire);
    if (__builtin_expect(!found, 0)) {
        void *handle = torch_handle(caller);
        found = handle ? dlsym(handle, functions[index].name) : NULL;
        if (!found) {
            static const char message[] =
                "rpcprops: torch calls a function of its agent that is not found in it\n";
            ssize_t written = write(2, message, sizeof message - 1);
            (void)written;
            abort();
        }
        atomic_store_explicit(&functions[index].real, found, memory_order_release);
    }
    return found;
}

#define REAL(type, index) ((type *)real_function(index, __builtin_return_address(0)))

/* ------------------------------------------------------------------------ */
/* Whether torch calls ours                                                 */
/* ------------------------------------------------------------------------ */

/* Whether `map` has a PLT entry for a function of its own that lies at `address`. */
static bool calls_by_name(const struct link_map *map, const void *address)
{
    const ElfW(Rela) *relocations = NULL;
    const ElfW(Sym) *symbols = NULL;
    size_t size = 0;
    for (const ElfW(Dyn) *entry = map->l_ld; entry->d_tag != DT_NULL; entry++) {
        if (entry->d_tag == DT_JMPREL)
            relocations = (const ElfW(Rela) *)entry->d_un.d_ptr;
        else if (entry->d_tag == DT_PLTRELSZ)
            size = entry->d_un.d_val;
        else if (entry->d_tag == DT_SYMTAB)
            symbols = (const ElfW(Sym) *)entry->d_un.d_ptr;
        else if (entry->d_tag == DT_SYMBOLIC ||
                 (entry->d_tag == DT_FLAGS && (entry->d_un.d_val & DF_SYMBOLIC)))
            return false;
    }
    if (!relocations || !symbols)
        return false;
    ElfW(Addr) wanted = (ElfW(Addr))address - map->l_addr;
    for (size_t i = 0; i < size / sizeof *relocations; i++)
        if (symbols[ELF64_R_SYM(relocations[i].r_info)].st_value == wanted)
            return true;
    return false;
}

/*
 * 0 if torch calls all four functions of ours; -1 if its library is not loaded;
 * else 1 + the index of the first function that it does not have, or does not
 * call by its name.
 */
int rpcprops_sends_probe(void)
{
    void *handle = torch_handle(NULL);
    struct link_map *map = NULL;
    if (!handle || dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0)
        return -1;
    for (int i = 0; i < FUNCTIONS; i++) {
        void *found = dlsym(handle, functions[i].name);
        if (!found || !calls_by_name(map, found))
            return i + 1;
        atomic_store_explicit(&functions[i].real, found, memory_order_release);
    }
    return 0;
}

const char *rpcprops_sends_name(int index)
{
    return index >= 0 && index < FUNCTIONS ? functions[index].name : NULL;
}

/* ------------------------------------------------------------------------ */
/* Counting                                                                 */
/* ------------------------------------------------------------------------ */

static struct {
    _Atomic int64_t sent[TYPES];
    _Atomic int64_t failed[TYPES];
    _Atomic int64_t delayed[TYPES];
} counts;

/* What this thread sends now.  Between the start of FaultyTensorPipeAgent::send
   and its end, or its call of TensorPipeAgent::send, it sends nothing else. */
static _Thread_local struct {
    bool fails;    /* shouldFailMessage was true, and the message was not sent since */
    unsigned type;
} now;

static void count(_Atomic int64_t *counter)
{
    atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

/* An exception of torch's passes through: nothing here has to be undone. */
void *faulty_send(SEND_ARGUMENTS)
{
    now.fails = false;
    void *returned = REAL(send_function, FAULTY_SEND)(result, self, to, message, timeout, devices);
    if (now.fails)
        count(&counts.failed[now.type]);
    now.fails = false;
    return returned;
}

bool should_fail(const void *self, int type)
{
    count(&counts.sent[TYPE_OF(type)]);
    bool fails = REAL(should_fail_function, SHOULD_FAIL)(self, type);
    now.fails = fails;
    now.type = TYPE_OF(type);
    return fails;
}

void *base_send(SEND_ARGUMENTS)
{
    now.fails = false;
    return REAL(send_function, BASE_SEND)(result, self, to, message, timeout, devices);
}

float delay_of(const void *self, int type)
{
    float seconds = REAL(delay_function, DELAY)(self, type);
    /* torch sleeps for whole milliseconds. */
    if ((int)(seconds * 1000) != 0)
        count(&counts.delayed[TYPE_OF(type)]);
    return seconds;
}

static void copy(const _Atomic int64_t *from, int64_t *to)
{
    for (int type = 0; type < TYPES; type++)
        to[type] = atomic_load_explicit(&from[type], memory_order_relaxed);
}

/* Each of the three arrays has TYPES elements. */
void rpcprops_sends_counts(int64_t *sent, int64_t *failed, int64_t *delayed)
{
    copy(counts.sent, sent);
    copy(counts.failed, failed);
    copy(counts.delayed, delayed);
}
