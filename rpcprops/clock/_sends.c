/*
 * What torch's faulty agent sends in one process: counted by message type, and
 * failed or delayed by tables that can be changed while it runs.
 *
 * This is the second half of the preload library; _preload.c is the clock.  It
 * stands in front of four member functions of libtorch_cpu.so.  torch calls
 * them by name (through its PLT, and through the vtable of the agent), so the
 * dynamic linker finds those of a preloaded library first.  Each one here calls
 * torch's own.  A process that has no such agent never comes here.
 *
 * The order of calls is that of FaultyTensorPipeAgent::send
 * (torch/csrc/distributed/rpc/testing/faulty_tensorpipe_agent.cpp): it asks
 * shouldFailMessage for the type of the message.  If that is true, it compares
 * its count for the payload with num_fail_sends, and fails the send while the
 * count is smaller.  Otherwise it calls TensorPipeAgent::send.  That calls
 * pipeWrite in the same thread, which asks getDelayForMessage and sleeps.
 *
 * Until rpcprops_faults_decide() the agent's own answers stand.  Afterwards the
 * answers here do.  For a send to fail then, the agent must have been made with
 * a num_fail_sends that no count reaches.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <pthread.h>
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
EXPORT int rpcprops_sends_counts(int64_t *rows);
EXPORT void rpcprops_sends_spare(int type);
EXPORT void rpcprops_faults_decide(void);
EXPORT int rpcprops_faults_arm(const uint8_t *fails, int64_t num_fail_sends, const float *delays);
EXPORT void rpcprops_faults_disarm(int number);
EXPORT int rpcprops_faults_counts(int number, int64_t *rows);

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

/* A std::vector<char> as libstdc++ lays it out. */
struct bytes {
    const char *begin;
    const char *end;
};
typedef const struct bytes *payload_function(const void *message);

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
#define PAYLOAD_NAME "_ZNK" RPC "7Message7payloadEv"
#define VTABLE_NAME "_ZTVN" RPC "21FaultyTensorPipeAgentE"

EXPORT send_function faulty_send __asm__(SEND_NAME);
EXPORT send_function base_send __asm__(BASE_SEND_NAME);
EXPORT should_fail_function should_fail __asm__(SHOULD_FAIL_NAME);
EXPORT delay_function delay_of __asm__(DELAY_NAME);

/* The last one is only called from here. */
enum { FAULTY_SEND, BASE_SEND, SHOULD_FAIL, DELAY, PAYLOAD, FUNCTIONS };

static struct {
    const char *name;
    void *_Atomic real;
} functions[FUNCTIONS] = {
    [FAULTY_SEND] = {SEND_NAME, NULL},
    [BASE_SEND] = {BASE_SEND_NAME, NULL},
    [SHOULD_FAIL] = {SHOULD_FAIL_NAME, NULL},
    [DELAY] = {DELAY_NAME, NULL},
    [PAYLOAD] = {PAYLOAD_NAME, NULL},
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
 * Whether the vtable of the agent names our send: torch calls it through that
 * (RpcAgent::send is virtual).  The linker gives it a PLT entry as well only
 * where some code of torch calls it by name, which depends on the compiler's
 * options: the wheels for the CPU have one, those for CUDA have none.
 */
static bool calls_by_vtable(void *handle)
{
    void *const *table = dlsym(handle, VTABLE_NAME);
    const ElfW(Sym) *symbol = NULL;
    Dl_info info;
    if (!table || !dladdr1(table, &info, (void **)&symbol, RTLD_DL_SYMENT) || !symbol)
        return false;
    for (size_t i = 0; i < symbol->st_size / sizeof *table; i++)
        if (table[i] == (void *)faulty_send)
            return true;
    return false;
}

/*
 * 0 if torch has all these functions and calls the four that stand here; -1 if
 * its library is not loaded; else 1 + the index of the first function that it
 * does not have, or does not call in a way that leads here.
 */
int rpcprops_sends_probe(void)
{
    void *handle = torch_handle(NULL);
    struct link_map *map = NULL;
    if (!handle || dlinfo(handle, RTLD_DI_LINKMAP, &map) != 0)
        return -1;
    for (int i = 0; i < FUNCTIONS; i++) {
        void *found = dlsym(handle, functions[i].name);
        if (!found)
            return i + 1;
        if (i == FAULTY_SEND ? !calls_by_vtable(handle)
                             : i != PAYLOAD && !calls_by_name(map, found))
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
/* Tables of faults                                                         */
/* ------------------------------------------------------------------------ */

/* How many sends of one payload a table has failed.  The payload follows. */
struct payload {
    struct payload *next;
    int64_t failed;
    size_t size;
    char content[];
};

#define BUCKETS 1024

/* Kept for the life of the process, because its counts are read later. */
struct table {
    struct table *next; /* armed later */
    int number;
    bool armed;
    bool fails[TYPES];
    int64_t num_fail_sends;
    float delays[TYPES]; /* virtual seconds */
    struct payload *payloads[BUCKETS];
    int64_t failed[TYPES];
    int64_t delayed[TYPES];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct table *tables; /* the first one armed */
static atomic_bool decides;

static struct payload *payload_of(struct table *table, const struct bytes *bytes)
{
    size_t size = (size_t)(bytes->end - bytes->begin);
    uint64_t hash = UINT64_C(14695981039346656037); /* FNV-1a */
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ (unsigned char)bytes->begin[i]) * UINT64_C(1099511628211);
    struct payload **place = &table->payloads[hash % BUCKETS];
    for (struct payload *known = *place; known; known = known->next)
        if (known->size == size && memcmp(known->content, bytes->begin, size) == 0)
            return known;
    struct payload *added = malloc(sizeof *added + size);
    if (!added)
        abort();
    *added = (struct payload){.next = *place, .size = size};
    memcpy(added->content, bytes->begin, size);
    *place = added;
    return added;
}

static void free_payloads(struct table *table)
{
    for (int i = 0; i < BUCKETS; i++)
        while (table->payloads[i]) {
            struct payload *gone = table->payloads[i];
            table->payloads[i] = gone->next;
            free(gone);
        }
}

static struct table *table_of(int number)
{
    struct table *table = tables;
    while (table && table->number != number)
        table = table->next;
    return table;
}

void rpcprops_faults_decide(void)
{
    atomic_store(&decides, true);
}

/* The number of the new table, or 0 where there is no memory for it.  It counts
   payloads from 0.  Both arrays have TYPES elements. */
int rpcprops_faults_arm(const uint8_t *fails, int64_t num_fail_sends, const float *delays)
{
    struct table *table = calloc(1, sizeof *table);
    if (!table)
        return 0;
    table->armed = true;
    table->num_fail_sends = num_fail_sends;
    for (int type = 0; type < TYPES; type++) {
        table->fails[type] = fails[type];
        table->delays[type] = delays[type];
    }
    pthread_mutex_lock(&lock);
    struct table **end = &tables;
    table->number = 1;
    for (; *end; end = &(*end)->next)
        table->number++;
    *end = table;
    int number = table->number;
    pthread_mutex_unlock(&lock);
    return number;
}

void rpcprops_faults_disarm(int number)
{
    pthread_mutex_lock(&lock);
    struct table *table = table_of(number);
    if (table) {
        table->armed = false;
        free_payloads(table);
    }
    pthread_mutex_unlock(&lock);
}

/* Adds a row to `rows` where a count of its type is not 0. */
static int add_row(int64_t *rows, int n, int type, int64_t sent, int64_t failed, int64_t delayed)
{
    if (!sent && !failed && !delayed)
        return n;
    memcpy(rows + 4 * n, (int64_t[]){type, sent, failed, delayed}, 4 * sizeof *rows);
    return n + 1;
}

/* What a table has failed and delayed so far: how many rows, as those of
   rpcprops_sends_counts(), but none is sent. */
int rpcprops_faults_counts(int number, int64_t *rows)
{
    int n = 0;
    pthread_mutex_lock(&lock);
    struct table *table = table_of(number);
    for (int type = 0; table && type < TYPES; type++)
        n = add_row(rows, n, type, 0, table->failed[type], table->delayed[type]);
    pthread_mutex_unlock(&lock);
    return n;
}

/* The table that fails this send: the first one armed whose count for the
   payload allows it. */
static struct table *failing_table(unsigned type, const struct bytes *bytes)
{
    for (struct table *table = tables; table; table = table->next) {
        if (!table->armed || !table->fails[type])
            continue;
        struct payload *payload = payload_of(table, bytes);
        if (payload->failed < table->num_fail_sends) {
            payload->failed++;
            return table;
        }
    }
    return NULL;
}

/* The longest delay of a type, counted for the table that asks for it. */
static float longest_delay(unsigned type)
{
    struct table *longest = NULL;
    pthread_mutex_lock(&lock);
    for (struct table *table = tables; table; table = table->next)
        if (table->armed && table->delays[type] > (longest ? longest->delays[type] : 0))
            longest = table;
    float seconds = longest ? longest->delays[type] : 0;
    /* torch sleeps for whole milliseconds. */
    if ((int)(seconds * 1000) != 0)
        longest->delayed[type]++;
    pthread_mutex_unlock(&lock);
    return seconds;
}

/* ------------------------------------------------------------------------ */
/* What torch calls                                                         */
/* ------------------------------------------------------------------------ */

static struct {
    _Atomic int64_t sent[TYPES];
    _Atomic int64_t failed[TYPES];
    _Atomic int64_t delayed[TYPES];
} counts;

/* What this thread sends now.  Between the start of FaultyTensorPipeAgent::send
   and its end, or its call of TensorPipeAgent::send, it sends nothing else. */
static _Thread_local struct {
    const void *message;
    bool fails; /* shouldFailMessage was true, and the message was not sent since */
    unsigned type;
    struct table *table; /* which of ours fails it, if one does */
} now;

/* The type whose sends by this thread are neither failed, delayed nor counted. */
static _Thread_local int spared = -1;

/* A negative type spares nothing. */
void rpcprops_sends_spare(int type)
{
    spared = type;
}

static void count(_Atomic int64_t *counter)
{
    atomic_fetch_add_explicit(counter, 1, memory_order_relaxed);
}

static void count_failure(void)
{
    count(&counts.failed[now.type]);
    if (now.table) {
        pthread_mutex_lock(&lock);
        now.table->failed[now.type]++;
        pthread_mutex_unlock(&lock);
    }
}

/* An exception of torch's passes through: nothing here has to be undone. */
void *faulty_send(SEND_ARGUMENTS)
{
    now.message = *message;
    now.fails = false;
    void *returned = REAL(send_function, FAULTY_SEND)(result, self, to, message, timeout, devices);
    if (now.fails)
        count_failure();
    now.fails = false;
    return returned;
}

/* Whether a table of ours fails the message that this thread sends now. */
static bool ours_fails(unsigned type)
{
    const struct bytes *bytes =
        ((payload_function *)real_function(PAYLOAD, __builtin_return_address(0)))(now.message);
    pthread_mutex_lock(&lock);
    now.table = failing_table(type, bytes);
    pthread_mutex_unlock(&lock);
    return now.table != NULL;
}

bool should_fail(const void *self, int number)
{
    unsigned type = TYPE_OF(number);
    now.type = type;
    now.table = NULL;
    if ((int)type == spared)
        return false;
    count(&counts.sent[type]);
    if (atomic_load_explicit(&decides, memory_order_acquire))
        now.fails = ours_fails(type);
    else
        now.fails = REAL(should_fail_function, SHOULD_FAIL)(self, number);
    return now.fails;
}

void *base_send(SEND_ARGUMENTS)
{
    now.fails = false;
    return REAL(send_function, BASE_SEND)(result, self, to, message, timeout, devices);
}

float delay_of(const void *self, int number)
{
    unsigned type = TYPE_OF(number);
    if ((int)type == spared)
        return 0;
    float seconds = atomic_load_explicit(&decides, memory_order_acquire)
                        ? longest_delay(type)
                        : REAL(delay_function, DELAY)(self, number);
    if ((int)(seconds * 1000) != 0)
        count(&counts.delayed[type]);
    return seconds;
}

/* What was sent so far: how many rows of four numbers (type, sent, failed,
   delayed) were written to `rows`, which has room for TYPES of them. */
int rpcprops_sends_counts(int64_t *rows)
{
    int n = 0;
    for (int type = 0; type < TYPES; type++) {
        int64_t sent = atomic_load_explicit(&counts.sent[type], memory_order_relaxed);
        int64_t failed = atomic_load_explicit(&counts.failed[type], memory_order_relaxed);
        int64_t delayed = atomic_load_explicit(&counts.delayed[type], memory_order_relaxed);
        n = add_row(rows, n, type, sent, failed, delayed);
    }
    return n;
}
