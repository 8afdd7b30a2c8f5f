/*
 * The ledger: every message of one world, in memory that its ranks and the test
 * process share.  ledger.py reads the same layout.
 *
 * A record is claimed with one atomic increment and filled in by its sender.
 * What becomes of the message later is written in place by whoever sees it: the
 * sender or the receiver.  Nobody waits for anybody, so a rank that is killed
 * leaves all that it wrote.  A record whose `ready` is kClaimed was claimed by a
 * rank that was killed before it had filled it in.
 *
 * The index finds the record of a request by the id of the request.  The two
 * high bytes of an id are the sender's number (see _agent.cpp), so an id is
 * unique in the world.
 */
#pragma once

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <stdexcept>
#include <string>

#include <dlfcn.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace rpcprops {

constexpr uint64_t kMagic = 0x32726567646c7277; /* "wrldger2" */
constexpr size_t kHeaderSize = 4096;
constexpr int kRankShift = 40;

/* What was seen of a message: bits of Record::flags. */
enum Flag : uint32_t {
  kWritten = 1,        /* TensorPipe has written it */
  kFailed = 2,         /* it was not written, or its request ended with an error */
  kAnswered = 4,       /* of a request: its answer has come, be it an exception */
  kTimedOut = 8,       /* of a request: its timeout has passed before that */
  kArrived = 16,       /* it has come to its receiver */
  kSwallowed = 32,     /* a second response to one request, which is not written */
  kOverdue = 64,       /* it was held as long as it may be, and then went all the same */
  kDiscarded = 128,    /* it was still waiting here when its agent was shut down */
  kSpared = 256,       /* faults are kept away from it */
  kRaised = 512,       /* of a request: its answer is an exception */
  kResponded = 1024,   /* of a request: a response to it is on its way */
  kLeaving = 2048,     /* its rank was leaving: see WireAgent::leave */
};

/* How far its sender has come: Record::ready. */
enum Ready : uint16_t {
  kClaimed = 0,
  kWhole = 1,  /* all is filled in */
  kHeldUp = 2, /* the same, and a fault table holds it up: nothing was done to it yet */
};

struct Record {
  int64_t id;
  int64_t first_id; /* of the first send of the same message, if this is a retry */
  int64_t virtual_ns;
  int64_t real_ns;
  int64_t size;
  std::atomic<int64_t> written_ns; /* virtual */
  std::atomic<int64_t> ended_ns;   /* virtual */
  int16_t sender;
  int16_t receiver;
  uint8_t type;
  uint8_t is_response;
  uint8_t action;
  uint8_t table; /* bits: 1 a fault table failed it, 2 one delayed it */
  int32_t fault; /* the index of the message fault that acted, or -1 */
  uint16_t retry;
  std::atomic<uint16_t> ready; /* one of Ready */
  std::atomic<uint32_t> flags;
  std::atomic<uint32_t> processed;
  std::atomic<uint32_t> response; /* of a request: 1 + the index of the response's record */
  uint32_t request;               /* of a response: 1 + the index of the request's record */
  uint32_t part;                  /* the fault table of `table`: see Tables::arm */
  uint32_t delay_ms;              /* virtual; how long a fault table holds it up */
};
static_assert(sizeof(Record) == 96);
static_assert(std::atomic<uint64_t>::is_always_lock_free);

struct Header {
  uint64_t magic;
  uint64_t capacity;   /* how many records there is room for */
  uint64_t index_size; /* entries of the index, a power of two */
  std::atomic<uint64_t> next;
  std::atomic<uint64_t> dropped; /* messages for which there was no room */
  std::atomic<uint32_t> changes; /* a futex: it counts what was written */
  std::atomic<uint32_t> waiters;
};

inline int64_t now_ns() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* The machine's clock: the preload library scales the other one. */
inline int64_t real_now_ns() {
  using Read = int64_t(int);
  static Read* read =
      reinterpret_cast<Read*>(dlsym(RTLD_DEFAULT, "rpcprops_clock_real_ns"));
  return read ? read(CLOCK_MONOTONIC) : now_ns();
}

class Ledger {
 public:
  /* `fd` is a memory file that ledger.py has prepared; without one (-1) the
     ledger is this process's own. */
  explicit Ledger(int fd) {
    struct stat file{};
    if (fd >= 0 && fstat(fd, &file) != 0)
      throw std::runtime_error(std::string("no ledger of messages: ") + strerror(errno));
    constexpr uint64_t kOwn = 1 << 14;
    size_ = fd >= 0 ? file.st_size : kHeaderSize + kOwn * (sizeof(Record) + 8);
    int flags = fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
    memory_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (memory_ == MAP_FAILED)
      throw std::runtime_error(std::string("no ledger of messages: ") + strerror(errno));
    header_ = static_cast<Header*>(memory_);
    if (fd < 0) {
      header_->magic = kMagic;
      header_->capacity = kOwn;
      header_->index_size = 2 * kOwn;
    }
    char* bytes = static_cast<char*>(memory_);
    records_ = reinterpret_cast<Record*>(bytes + kHeaderSize);
    index_ = reinterpret_cast<std::atomic<uint32_t>*>(records_ + header_->capacity);
    if (header_->magic != kMagic) {
      munmap(memory_, size_);
      throw std::runtime_error("the ledger of messages has another layout");
    }
  }

  ~Ledger() { munmap(memory_, size_); }
  Ledger(const Ledger&) = delete;
  Ledger& operator=(const Ledger&) = delete;

  /* A new record, with both times; null where there is no room. */
  Record* claim() {
    uint64_t place = header_->next.fetch_add(1);
    if (place >= header_->capacity) {
      header_->dropped.fetch_add(1);
      return nullptr;
    }
    Record* record = records_ + place;
    record->virtual_ns = now_ns();
    record->real_ns = real_now_ns();
    record->id = record->first_id = -1;
    record->fault = -1;
    return record;
  }

  /* The record is filled in: others may read it. */
  void publish(Record* record) {
    if (!record)
      return;
    if (!record->is_response && record->id >= 0)
      enter(record);
    record->ready.store(kWhole, std::memory_order_release);
    changed();
  }

  /* A fault table holds the message up.  The test process may read the record,
     which a rank that dies meanwhile leaves; ranks may not yet. */
  void hold_up(Record* record, uint32_t part, uint32_t ms) {
    if (!record)
      return;
    record->table |= 2;
    record->part = part;
    record->delay_ms = ms;
    record->ready.store(kHeldUp, std::memory_order_release);
  }

  /* The record of a request, null if there is none. */
  Record* find(int64_t id) const {
    if (id < 0)
      return nullptr;
    uint64_t mask = header_->index_size - 1;
    for (uint64_t at = place_of(id), tries = 0; tries <= mask; at++, tries++) {
      uint32_t found = index_[at & mask].load(std::memory_order_acquire);
      if (!found)
        return nullptr;
      if (records_[found - 1].id == id)
        return records_ + found - 1;
    }
    return nullptr;
  }

  /* The record at a place; null while it is not published. */
  Record* at(uint64_t place) const {
    if (place >= header_->capacity || place >= header_->next.load())
      return nullptr;
    Record* record = records_ + place;
    return record->ready.load(std::memory_order_acquire) == kWhole ? record : nullptr;
  }

  uint32_t number_of(const Record* record) const {
    return record ? static_cast<uint32_t>(record - records_ + 1) : 0;
  }

  Record* numbered(uint32_t number) const {
    return number ? records_ + number - 1 : nullptr;
  }

  /* Sets flags; returns those that were set before. */
  uint32_t note(Record* record, uint32_t flags) {
    if (!record)
      return 0;
    uint32_t before = record->flags.fetch_or(flags);
    changed();
    return before;
  }

  uint32_t changes() const { return header_->changes.load(); }

  void changed() {
    header_->changes.fetch_add(1);
    if (header_->waiters.load())
      syscall(SYS_futex, &header_->changes, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  /* Waits until something is written, if nothing was since `seen`. */
  void wait(uint32_t seen) {
    header_->waiters.fetch_add(1);
    if (header_->changes.load() == seen)
      syscall(SYS_futex, &header_->changes, FUTEX_WAIT, seen, nullptr, nullptr, 0);
    header_->waiters.fetch_sub(1);
  }

 private:
  /* Ids of one sender follow each other, and so do their places. */
  uint64_t place_of(int64_t id) const {
    uint64_t sender = static_cast<uint64_t>(id) >> kRankShift;
    return static_cast<uint64_t>(id) + sender * (header_->index_size / 16);
  }

  void enter(Record* record) {
    uint64_t mask = header_->index_size - 1;
    uint32_t number = number_of(record);
    for (uint64_t at = place_of(record->id), tries = 0; tries <= mask; at++, tries++) {
      uint32_t empty = 0;
      if (index_[at & mask].compare_exchange_strong(empty, number))
        return;
    }
  }

  void* memory_;
  size_t size_;
  Header* header_;
  Record* records_;
  std::atomic<uint32_t>* index_;
};

} // namespace rpcprops
