/*
 * An RPC agent that shows and disturbs every message, requests and responses.
 *
 * WireAgent is torch's TensorPipeAgent with three additions:
 *
 *   - every message that it sends is in a ledger (_ledger.h), with what became
 *     of it;
 *   - fault tables fail and delay sends as FaultyTensorPipeAgent does it
 *     (torch/csrc/distributed/rpc/testing/faulty_tensorpipe_agent.cpp);
 *   - message faults fail, lose, delay, hold and duplicate single messages.
 *
 * It hooks into the two functions that a subclass may replace.  A request comes
 * through send(), which calls pipeWrite() in the same thread before it returns.
 * A response comes through pipeWrite() alone (TensorPipeAgent::
 * sendCompletedResponseMessage).  The callback for requests is wrapped, to see
 * what arrives.
 *
 * Ids.  torch counts the ids of requests from 0 at each rank.  Here the count
 * of a rank begins at its number << 40, and goes on where the last agent of the
 * process ended, so an id is unique in the world and names the sender.  torch
 * uses an id only as the key under which a response finds its request, so
 * nothing else changes.
 *
 * Numbers.  The ledger names ranks by their numbers in the cluster, by which
 * faults name them too.  A program that calls init_rpc itself may give a process
 * another rank.  Such a process says so in the store in which the ranks meet.
 */
#include <torch/csrc/distributed/rpc/request_callback_impl.h>
#include <torch/csrc/distributed/rpc/rref_context.h>
#include <torch/csrc/distributed/rpc/tensorpipe_agent.h>
#include <torch/csrc/distributed/rpc/utils.h>
#include <torch/csrc/utils/pybind.h>

#include <tensorpipe/common/error.h>

#include <array>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <type_traits>

#include "_ledger.h"

namespace rpcprops {

using namespace torch::distributed::rpc;
using Clock = std::chrono::steady_clock;
using WriteCallback = std::function<void(const tensorpipe::Error&)>;
using MessagePtr = c10::intrusive_ptr<Message>;

/* ------------------------------------------------------------------------ */
/* Private members of torch's agent                                         */
/* ------------------------------------------------------------------------ */

/* C++ lets an explicit instantiation name private members. */
template <class Tag, auto Member>
struct Reach {
  friend auto member(Tag) { return Member; }
};
#define RPCPROPS_REACH(Tag, Class, name) \
  struct Tag {                           \
    friend auto member(Tag);             \
  };                                     \
  template struct Reach<Tag, &Class::name>

RPCPROPS_REACH(NextId, TensorPipeAgent, nextMessageID_);
RPCPROPS_REACH(Pipes, TensorPipeAgent, connectedPipes_);
RPCPROPS_REACH(PipesMutex, TensorPipeAgent, connectedPipesMutex_);
RPCPROPS_REACH(CallCountMutex, TensorPipeAgent, callCountMutex_);
RPCPROPS_REACH(ClientCalls, TensorPipeAgent, clientActiveCalls_);
RPCPROPS_REACH(ServerCalls, TensorPipeAgent, serverActiveCalls_);
RPCPROPS_REACH(ServerAsyncCalls, TensorPipeAgent, serverActiveAsyncCalls_);
RPCPROPS_REACH(RetryMap, RpcAgent, rpcRetryMap_);
RPCPROPS_REACH(RetryMutex, RpcAgent, rpcRetryMutex_);
RPCPROPS_REACH(Pool, TensorPipeAgent, threadPool_);
RPCPROPS_REACH(PoolMutex, c10::ThreadPool, mutex_);
RPCPROPS_REACH(PoolTasks, c10::ThreadPool, tasks_);
RPCPROPS_REACH(PoolAvailable, c10::ThreadPool, available_);
RPCPROPS_REACH(PoolTotal, c10::ThreadPool, total_);
RPCPROPS_REACH(RRefMutex, RRefContext, mutex_);
RPCPROPS_REACH(Owners, RRefContext, owners_);
RPCPROPS_REACH(PendingOwners, RRefContext, pendingOwners_);
RPCPROPS_REACH(Forks, RRefContext, forks_);
RPCPROPS_REACH(PendingUsers, RRefContext, pendingUsers_);
RPCPROPS_REACH(ConfirmedUsers, RRefContext, confirmedUsers_);
RPCPROPS_REACH(PendingChildren, RRefContext, pendingChildren_);
RPCPROPS_REACH(PendingFutures, RRefContext, numPendingFutures_);

/* How pipeWrite takes its message: by reference in newer torch, by value before. */
template <class T>
struct SecondOf;
template <class C, class A, class B, class... Rest>
struct SecondOf<void (C::*)(A, B, Rest...) noexcept> {
  using type = B;
};
struct Opened : TensorPipeAgent {
  using TensorPipeAgent::pipeWrite;
};
using MessageArgument = SecondOf<decltype(&Opened::pipeWrite)>::type;

/* ------------------------------------------------------------------------ */
/* Types of messages                                                        */
/* ------------------------------------------------------------------------ */

constexpr int kTypes = 256;

/* message.h: the low byte of a type is its number, the bits above it say whether
   it is a request or a response. */
int number_of(MessageType type) {
  return static_cast<int>(type) % kTypes;
}

struct TypeName {
  int number;
  const char* name;
};

const std::vector<TypeName>& type_names() {
#define RPCPROPS_TYPE(name) {number_of(MessageType::name), #name}
  static const std::vector<TypeName> names = {
      RPCPROPS_TYPE(SCRIPT_CALL),
      RPCPROPS_TYPE(SCRIPT_RET),
      RPCPROPS_TYPE(PYTHON_CALL),
      RPCPROPS_TYPE(PYTHON_RET),
      RPCPROPS_TYPE(SCRIPT_REMOTE_CALL),
      RPCPROPS_TYPE(PYTHON_REMOTE_CALL),
      RPCPROPS_TYPE(REMOTE_RET),
      RPCPROPS_TYPE(SCRIPT_RREF_FETCH_CALL),
      RPCPROPS_TYPE(PYTHON_RREF_FETCH_CALL),
      RPCPROPS_TYPE(SCRIPT_RREF_FETCH_RET),
      RPCPROPS_TYPE(PYTHON_RREF_FETCH_RET),
      RPCPROPS_TYPE(RREF_USER_DELETE),
      RPCPROPS_TYPE(RREF_FORK_REQUEST),
      RPCPROPS_TYPE(RREF_CHILD_ACCEPT),
      RPCPROPS_TYPE(RREF_ACK),
      RPCPROPS_TYPE(FORWARD_AUTOGRAD_REQ),
      RPCPROPS_TYPE(FORWARD_AUTOGRAD_RESP),
      RPCPROPS_TYPE(BACKWARD_AUTOGRAD_REQ),
      RPCPROPS_TYPE(BACKWARD_AUTOGRAD_RESP),
      RPCPROPS_TYPE(CLEANUP_AUTOGRAD_CONTEXT_REQ),
      RPCPROPS_TYPE(CLEANUP_AUTOGRAD_CONTEXT_RESP),
      RPCPROPS_TYPE(RUN_WITH_PROFILING_REQ),
      RPCPROPS_TYPE(RUN_WITH_PROFILING_RESP),
      RPCPROPS_TYPE(RREF_BACKWARD_REQ),
      RPCPROPS_TYPE(RREF_BACKWARD_RESP),
      RPCPROPS_TYPE(EXCEPTION),
  };
#undef RPCPROPS_TYPE
  return names;
}

/* -1 stands for every type. */
int type_named(const std::string& name) {
  if (name.empty())
    return -1;
  for (const TypeName& type : type_names())
    if (name == type.name)
      return type.number;
  throw py::value_error("torch has no message type " + name);
}

std::string name_of(int number) {
  for (const TypeName& type : type_names())
    if (number == type.number)
      return type.name;
  return "type " + std::to_string(number);
}

/* A sparse tensor consists of two others, and has no size of its own. */
int64_t bytes_of(const torch::Tensor& tensor) {
  if (!tensor.defined())
    return 0;
  if (tensor.layout() != c10::kSparse)
    return tensor.nbytes();
  return tensor._indices().nbytes() + tensor._values().nbytes();
}

int64_t size_of(const Message& message) {
  int64_t size = message.payload().size();
  for (const auto& tensor : message.tensors())
    size += bytes_of(tensor);
  return size;
}

std::string text_of(const Message& message) {
  const auto& payload = message.payload();
  return std::string(payload.begin(), payload.end());
}

/* ------------------------------------------------------------------------ */
/* Fault tables                                                             */
/* ------------------------------------------------------------------------ */

class WireAgent;

/*
 * What torch's faulty agent does, and what _sends.c does in front of it: the
 * table of the options acts as in torch, and further ones may be armed while
 * the process runs.  The one armed first fails a send that it may still fail;
 * of several delays the longest applies.
 *
 * What a table does to a send is in the ledger before it is counted: whenever
 * the process ends, no count is above what the ledger shows.
 */
class Tables {
 public:
  /* `part` names the table in the ledger: 0 is that of an agent's options, n the
     n-th that was armed for a part of the run.  The former acts on what that agent
     sends, the latter on what any agent sends.  After a second init two agents are
     alive: torch's RRefContext keeps the first. */
  int arm(
      const std::vector<std::string>& messages_to_fail,
      int64_t num_fail_sends,
      const std::unordered_map<std::string, float>& messages_to_delay,
      uint32_t part,
      const WireAgent* agent) {
    auto table = std::make_unique<Table>();
    table->part = part;
    table->agent = agent;
    table->num_fail_sends = num_fail_sends;
    for (const auto& name : messages_to_fail)
      table->fails[type_named(name)] = true;
    for (const auto& [name, seconds] : messages_to_delay)
      table->delays[type_named(name)] = seconds;
    std::lock_guard<std::mutex> lock(mutex_);
    tables_.emplace(next_, std::move(table));
    return next_++;
  }

  /* Forgets all tables and all counts.  No table may be in use. */
  void clear() {
    std::lock_guard<std::mutex> lock(mutex_);
    tables_.clear();
    sent_ = failed_ = delayed_ = Counts{};
  }

  /* A table that was forgotten needs nothing: its agent may outlive it. */
  void disarm(int number) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = tables_.find(number);
    if (found == tables_.end())
      return;
    found->second->armed = false;
    found->second->failures.clear();
  }

  /* Whether a table fails this send; it is counted, after `note` was told which. */
  template <class Note>
  bool fails(
      const WireAgent* agent, int type, const std::string& payload, const Note& note) {
    std::lock_guard<std::mutex> lock(mutex_);
    sent_[type]++;
    for (const auto& [number, table] : tables_) {
      if (!table->acts_for(agent) || !table->fails[type])
        continue;
      int64_t& failed = table->failures[payload];
      if (failed < table->num_fail_sends) {
        note(table->part);
        failed++;
        failed_[type]++;
        table->failed[type]++;
        return true;
      }
    }
    return false;
  }

  /* Whether any table could fail this type: the payload is copied only then. */
  bool may_fail(const WireAgent* agent, int type) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [number, table] : tables_)
      if (table->acts_for(agent) && table->fails[type])
        return true;
    sent_[type]++;
    return false;
  }

  /* How long a table holds this send up; it is counted, after `note` was told which
     table and how long.  torch sleeps for whole milliseconds. */
  template <class Note>
  int64_t delay_ms(const WireAgent* agent, int type, const Note& note) {
    std::lock_guard<std::mutex> lock(mutex_);
    Table* longest = nullptr;
    for (const auto& [number, table] : tables_)
      if (table->acts_for(agent) && table->delays[type] > (longest ? longest->delays[type] : 0))
        longest = table.get();
    auto ms = longest ? static_cast<int>(longest->delays[type] * kSecToMsConversion) : 0;
    if (ms) {
      note(longest->part, ms);
      delayed_[type]++;
      longest->delayed[type]++;
    }
    return ms;
  }

  /* By type: how many sends were tried, failed and delayed. */
  py::dict counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    return rows(&sent_, failed_, delayed_);
  }

  py::dict counts_of(int number) {
    std::lock_guard<std::mutex> lock(mutex_);
    return rows(nullptr, tables_.at(number)->failed, tables_.at(number)->delayed);
  }

 private:
  using Counts = std::array<int64_t, kTypes>;

  struct Table {
    bool armed = true;
    uint32_t part = 0;
    const WireAgent* agent = nullptr; /* of all agents if it is null */
    int64_t num_fail_sends = 0;
    std::array<bool, kTypes> fails{};
    std::array<float, kTypes> delays{};
    std::unordered_map<std::string, int64_t> failures; /* by payload */
    Counts failed{};
    Counts delayed{};

    bool acts_for(const WireAgent* sender) const {
      return armed && (!agent || agent == sender);
    }
  };

  static py::dict rows(const Counts* sent, const Counts& failed, const Counts& delayed) {
    py::dict found;
    for (int type = 0; type < kTypes; type++) {
      int64_t tried = sent ? (*sent)[type] : 0;
      if (tried || failed[type] || delayed[type])
        found[py::str(name_of(type))] = py::make_tuple(tried, failed[type], delayed[type]);
    }
    return found;
  }

  std::mutex mutex_;
  /* A number is never used again: see disarm(). */
  std::map<int, std::unique_ptr<Table>> tables_;
  int next_ = 0;
  Counts sent_{}, failed_{}, delayed_{};
};

/* Of this process, because they are armed whether an agent runs or not. */
Tables& tables() {
  static Tables all;
  return all;
}

/* The type whose sends by this thread are left alone, with their responses. */
thread_local int spared = -1;

/* ------------------------------------------------------------------------ */
/* Message faults                                                           */
/* ------------------------------------------------------------------------ */

enum class Action : uint8_t { kNone, kFail, kLose, kDelay, kHold, kDuplicate };
const char* const kActions[] = {"", "fail", "lose", "delay", "hold", "duplicate"};

/* Which messages: those to a rank (-1: any), of a type (-1: any), one way. */
struct Pattern {
  int64_t to = -1;
  int type = -1;
  bool requests = true;
  bool responses = true;

  static Pattern of(const py::dict& given) {
    Pattern pattern;
    pattern.to = given["to"].cast<int64_t>();
    pattern.type = type_named(given["type"].cast<std::string>());
    auto way = given["way"].cast<std::string>();
    if (!way.empty() && way != "request" && way != "response")
      throw py::value_error("a message goes one way, 'request' or 'response', not " + way);
    pattern.requests = way != "response";
    pattern.responses = way != "request";
    return pattern;
  }

  bool matches(const Record& record) const {
    return (to < 0 || to == record.receiver) && (type < 0 || type == record.type) &&
        (record.is_response ? responses : requests);
  }
};

/* The n-th message of a rank that fits a pattern, looked for in the ledger. */
struct Awaited {
  int64_t at = -1;
  Pattern pattern;
  int64_t n = 1;
  /* How far the ledger was searched. */
  uint64_t place = 0;
  int64_t seen = 0;
  Record* found = nullptr;

  /* Whether that message has passed: a request was answered, a response written. */
  bool has_passed(Ledger& ledger) {
    while (!found) {
      Record* record = ledger.at(place);
      if (!record)
        return false;
      place++;
      if (record->sender == at && !(record->flags.load() & kSpared) &&
          pattern.matches(*record) && ++seen == n)
        found = record;
    }
    return found->flags.load() & (found->is_response ? kWritten : kAnswered);
  }
};

struct MessageFault {
  Pattern pattern;
  std::string which;
  int64_t n = 1;
  Action action = Action::kNone;
  double seconds = 0;
  bool waits = false;
  Awaited until;
  int64_t matched = 0; /* messages so far */

  static MessageFault of(const py::dict& given) {
    MessageFault fault;
    fault.pattern = Pattern::of(given);
    fault.which = given["which"].cast<std::string>();
    fault.n = given["n"].cast<int64_t>();
    auto action = given["action"].cast<std::string>();
    for (int i = 1; i < 6; i++)
      if (action == kActions[i])
        fault.action = static_cast<Action>(i);
    if (fault.action == Action::kNone)
      throw py::value_error("a message fault cannot " + action);
    /* TensorPipe tells nobody that a response was not written, and torch's client
       asserts that it knows the id of each response. */
    if (fault.action == Action::kFail || fault.action == Action::kDuplicate)
      fault.pattern.responses = false;
    fault.seconds = given["seconds"].cast<double>();
    if (!given["until"].is_none()) {
      auto until = given["until"].cast<py::dict>();
      fault.waits = true;
      fault.until.at = until["at"].cast<int64_t>();
      fault.until.pattern = Pattern::of(until);
      fault.until.n = until["n"].cast<int64_t>();
    }
    return fault;
  }

  /* Whether it acts on a message that fits; the message is counted. */
  bool strikes() {
    ++matched;
    return which == "every" || (which == "first" ? matched <= n : matched == n);
  }
};

/* The error of a request that waits here when the agent is shut down. */
class ShutDown : public tensorpipe::BaseError {
 public:
  std::string what() const override {
    return "the agent was shut down while rpcprops held this message back";
  }
};

/* ------------------------------------------------------------------------ */
/* Messages that wait                                                       */
/* ------------------------------------------------------------------------ */

/* A message that is written later. */
struct Waiting {
  std::function<void()> write;
  std::function<void()> discard;
  Record* record = nullptr;
  bool held = false;
  Awaited until;
  std::atomic<bool> gone{false};
};

/*
 * Writes messages later: one thread waits for times (on the scaled clock), and
 * a second one, which exists only while something is held, watches the ledger.
 */
class Later {
 public:
  explicit Later(std::shared_ptr<Ledger> ledger) : ledger_(std::move(ledger)) {}
  ~Later() { stop(); }

  void put(std::shared_ptr<Waiting> message, double seconds) {
    auto when = Clock::now() +
        std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    std::unique_lock<std::mutex> lock(mutex_);
    if (stopped_) {
      lock.unlock();
      discard(*message);
      return;
    }
    by_time_.emplace(when, message);
    if (!timer_.joinable())
      timer_ = std::thread([this] { serve_times(); });
    if (message->held) {
      held_.push_back(message);
      if (!watcher_.joinable())
        watcher_ = std::thread([this] { watch(); });
    }
    lock.unlock();
    notify();
  }

  /* Ends both threads.  What still waits is not written any more. */
  void stop() {
    std::vector<std::shared_ptr<Waiting>> left;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_ = true;
      for (auto& [when, message] : by_time_)
        left.push_back(message);
      by_time_.clear();
      held_.clear();
    }
    notify();
    for (std::thread* thread : {&timer_, &watcher_})
      if (thread->joinable())
        thread->join();
    for (const auto& message : left)
      discard(*message);
  }

  /* Drops what was written before its time, and would otherwise stay until then. */
  void drop_written() {
    /* They are freed without the lock: a message may have a tensor that Python
       knows, whose end waits for the GIL. */
    std::vector<std::shared_ptr<Waiting>> written;
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto it = by_time_.begin(); it != by_time_.end();) {
      if (it->second->gone) {
        written.push_back(std::move(it->second));
        it = by_time_.erase(it);
      } else {
        ++it;
      }
    }
    std::erase_if(held_, [&](const auto& message) {
      bool gone = message->gone;
      if (gone)
        written.push_back(message);
      return gone;
    });
  }

  size_t size() {
    std::lock_guard<std::mutex> lock(mutex_);
    size_t count = 0;
    for (auto& [when, message] : by_time_)
      count += !message->gone;
    return count;
  }

 private:
  /* Wakes both threads. */
  void notify() {
    condition_.notify_all();
    ledger_->changed();
  }

  void write(Waiting& message, uint32_t flags) {
    if (!message.gone.exchange(true)) {
      ledger_->note(message.record, flags);
      message.write();
    }
  }

  void discard(Waiting& message) {
    if (!message.gone.exchange(true)) {
      ledger_->note(message.record, kDiscarded | kFailed);
      message.discard();
    }
  }

  void serve_times() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopped_) {
      if (by_time_.empty()) {
        condition_.wait(lock);
        continue;
      }
      auto first = by_time_.begin();
      if (Clock::now() < first->first) {
        auto when = first->first;
        condition_.wait_until(lock, when);
        continue;
      }
      auto message = first->second;
      by_time_.erase(first);
      lock.unlock();
      write(*message, message->held ? kOverdue : 0);
      message.reset();
      lock.lock();
    }
  }

  void watch() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!stopped_) {
      if (held_.empty()) {
        /* Whoever waits for the ledger makes each message of all ranks dearer. */
        condition_.wait(lock);
        continue;
      }
      uint32_t seen = ledger_->changes();
      std::vector<std::shared_ptr<Waiting>> ended;
      for (auto it = held_.begin(); it != held_.end();) {
        bool has_ended = (*it)->gone || (*it)->until.has_passed(*ledger_);
        if (has_ended)
          ended.push_back(std::move(*it));
        it = has_ended ? held_.erase(it) : it + 1;
      }
      lock.unlock();
      for (const auto& message : ended)
        write(*message, 0);
      if (ended.empty())
        ledger_->wait(seen);
      ended.clear();
      lock.lock();
    }
  }

  std::shared_ptr<Ledger> ledger_;
  std::mutex mutex_;
  std::condition_variable condition_;
  bool stopped_ = false;
  std::multimap<Clock::time_point, std::shared_ptr<Waiting>> by_time_;
  std::vector<std::shared_ptr<Waiting>> held_;
  std::thread timer_;
  std::thread watcher_;
};

/* ------------------------------------------------------------------------ */
/* What arrives                                                             */
/* ------------------------------------------------------------------------ */

/* Notes each request that is processed here, and has torch's own do that. */
class Arrivals : public RequestCallback {
 public:
  Arrivals(std::unique_ptr<RequestCallback> inner, std::shared_ptr<Ledger> ledger)
      : inner_(std::move(inner)), ledger_(std::move(ledger)) {}

 protected:
  c10::intrusive_ptr<JitFuture> processMessage(
      Message& request,
      std::vector<c10::Stream> streams) const override {
    if (Record* record = ledger_->find(request.id())) {
      record->processed.fetch_add(1);
      ledger_->note(record, kArrived);
    }
    return (*inner_)(request, std::move(streams));
  }

 private:
  std::unique_ptr<RequestCallback> inner_;
  std::shared_ptr<Ledger> ledger_;
};

/* ------------------------------------------------------------------------ */
/* The agent                                                                */
/* ------------------------------------------------------------------------ */

struct WireRpcBackendOptions : public TensorPipeRpcBackendOptions {
  WireRpcBackendOptions(
      int num_worker_threads,
      float rpc_timeout,
      std::string init_method,
      std::vector<std::string> fails,
      std::unordered_map<std::string, float> delays,
      int num_fails,
      std::vector<py::dict> faults,
      int ledger,
      int number_in_cluster)
      : TensorPipeRpcBackendOptions(
            num_worker_threads,
            std::optional<std::vector<std::string>>(),
            std::optional<std::vector<std::string>>(),
            rpc_timeout,
            std::move(init_method)),
        messages_to_fail(std::move(fails)),
        messages_to_delay(std::move(delays)),
        num_fail_sends(num_fails),
        ledger_fd(ledger),
        number(number_in_cluster) {
    for (const auto& fault : faults)
      message_faults.push_back(MessageFault::of(fault));
  }

  std::vector<std::string> messages_to_fail;
  std::unordered_map<std::string, float> messages_to_delay;
  int num_fail_sends;
  int ledger_fd;
  int number; /* of this process in its cluster; -1: it is its rank */
  std::vector<MessageFault> message_faults;

  worker_id_t number_of(worker_id_t rank) const {
    return number < 0 ? rank : static_cast<worker_id_t>(number);
  }
};

/* Where a rank has its number in the cluster, if that is another one. */
std::string number_key(worker_id_t rank) {
  return "rpcprops/number/" + std::to_string(rank);
}

/* What a process says in the store if its rank is not its number in the cluster.
 * It does so before any other rank can know of it, and takes it back if it is
 * refused: another process may have that rank. */
class OtherNumber {
 public:
  OtherNumber(
      const c10::intrusive_ptr<::c10d::Store>& store,
      worker_id_t rank,
      const WireRpcBackendOptions& options)
      : store_(store), key_(number_key(rank)), is_kept(options.number_of(rank) == rank) {
    if (is_kept)
      return;
    if (store->check({key_}))
      before_ = store->get_to_str(key_);
    store->set(key_, std::to_string(options.number));
  }

  ~OtherNumber() {
    if (is_kept)
      return;
    try {
      if (before_)
        store_->set(key_, *before_);
      else
        store_->deleteKey(key_);
    } catch (const std::exception&) {
      /* The store is gone. */
    }
  }

  OtherNumber(const OtherNumber&) = delete;
  OtherNumber& operator=(const OtherNumber&) = delete;

 private:
  c10::intrusive_ptr<::c10d::Store> store_;
  std::string key_;
  std::optional<std::string> before_;

 public:
  bool is_kept;
};

/* The request that this thread sends: from send() to pipeWrite(). */
struct Sending {
  Record* record = nullptr;
  bool is_spared = false;
  Action action = Action::kNone;
  double seconds = 0;
  bool waits = false;
  Awaited until;
};
thread_local Sending* sending = nullptr;

class WireAgent : public TensorPipeAgent {
 public:
  WireAgent(
      const c10::intrusive_ptr<::c10d::Store>& store,
      std::string name,
      worker_id_t rank,
      std::optional<int> world_size, /* none: the group is dynamic */
      WireRpcBackendOptions options,
      std::shared_ptr<Ledger> ledger)
      : TensorPipeAgent(
            store,
            std::move(name),
            rank,
            world_size,
            options,
            {},
            {},
            std::make_unique<Arrivals>(std::make_unique<RequestCallbackImpl>(), ledger)),
        rank_(rank),
        number_(options.number_of(rank)),
        store_(store),
        ledger_(std::move(ledger)),
        faults_(std::move(options.message_faults)),
        later_(ledger_),
        table_(tables().arm(
            options.messages_to_fail,
            options.num_fail_sends,
            options.messages_to_delay,
            0,
            this)) {
    next_id().store((static_cast<uint64_t>(number_) << kRankShift) + ids_used());
    /* All ranks of a static group have come to the store by now. */
    for (int other = 0; other < world_size.value_or(0); other++)
      in_cluster(static_cast<worker_id_t>(other));
  }

  ~WireAgent() override {
    shutdown();
    tables().disarm(table_);
  }

  c10::intrusive_ptr<JitFuture> send(
      const WorkerInfo& to,
      MessagePtr message,
      const float timeout = kUnsetRpcTimeout,
      const DeviceMap& devices = {}) override {
    int type = number_of(message->type());
    Sending now;
    now.is_spared = type == spared;
    claim(now, *message, in_cluster(to.id_), false);
    if (now.record)
      note_retry(*now.record, message->id());
    if (!now.is_spared) {
      auto note = [&](uint32_t part) {
        if (now.record) {
          now.record->table |= 1;
          now.record->part = part;
          now.record->action = 0;
          now.record->fault = -1;
        }
        note_failed(now, *message);
      };
      if (tables().may_fail(this, type) &&
          tables().fails(this, type, text_of(*message), note))
        return failed(*message);
      if (now.action == Action::kFail) {
        note_failed(now, *message);
        return failed(*message);
      }
    }
    c10::intrusive_ptr<JitFuture> future;
    Sending* before = sending;
    sending = &now;
    try {
      future = TensorPipeAgent::send(to, std::move(message), timeout, devices);
    } catch (...) {
      sending = before;
      if (now.record && now.record->ready.load() != kWhole) {
        ledger_->note(now.record, kFailed);
        ledger_->publish(now.record);
      }
      throw;
    }
    sending = before;
    if (now.record)
      future->addCallback([ledger = ledger_, record = now.record](JitFuture& done) {
        note_end(*ledger, *record, done);
      });
    return future;
  }

  void shutdownImpl() override {
    later_.stop();
    TensorPipeAgent::shutdownImpl();
    /* The responses to an id that came again would be taken for second ones. */
    ids_used() = next_id().load() - (static_cast<uint64_t>(number_) << kRankShift);
  }

  /* Replaces all faults, and counts from 0.  Nothing may be under way. */
  void rearm(
      const std::vector<std::string>& fails,
      int64_t num_fail_sends,
      const std::unordered_map<std::string, float>& delays,
      const std::vector<py::dict>& message_faults) {
    std::vector<MessageFault> faults;
    for (const auto& fault : message_faults)
      faults.push_back(MessageFault::of(fault));
    tables().clear();
    table_ = tables().arm(fails, num_fail_sends, delays, 0, this);
    leaving_ = false;
    later_.drop_written();
    std::lock_guard<std::mutex> lock(faults_mutex_);
    faults_ = std::move(faults);
  }

  /* From now on messages are marked: they are of a shutdown, and its delays are not
     predicted. */
  void leave() {
    leaving_ = true;
  }

  /* What the agent, and the RRefs of this process, hold at the moment.  It changes
     nothing. */
  py::dict state() {
    std::map<int, size_t> pipes;
    size_t retries = 0;
    int32_t client = 0, server = 0, server_async = 0;
    size_t timeouts = 0, timed_messages = 0, waiting = 0, tasks = 0;
    std::map<std::string, int64_t> rrefs;
    {
      py::gil_scoped_release release;
      {
        std::lock_guard<std::mutex> lock(this->*member(PipesMutex{}));
        for (auto& [id, pipe] : this->*member(Pipes{})) {
          std::lock_guard<std::mutex> pipe_lock(pipe.mutex_);
          pipes[id] = pipe.pendingResponseMessage_.size();
        }
      }
      {
        std::lock_guard<std::mutex> lock(this->*member(RetryMutex{}));
        for (auto& [when, infos] : this->*member(RetryMap{}))
          retries += infos.size();
      }
      {
        std::lock_guard<std::mutex> lock(this->*member(CallCountMutex{}));
        client = this->*member(ClientCalls{});
        server = this->*member(ServerCalls{});
        server_async = this->*member(ServerAsyncCalls{});
      }
      timeouts = timeoutMapSize();
      timed_messages = messageIdToTimeoutMapSize();
      waiting = later_.size();
      {
        auto& pool = this->*member(Pool{});
        std::lock_guard<std::mutex> lock(pool.*member(PoolMutex{}));
        tasks = (pool.*member(PoolTasks{})).size() + pool.*member(PoolTotal{}) -
            pool.*member(PoolAvailable{});
      }
      {
        auto& context = RRefContext::getInstance();
        std::lock_guard<std::mutex> lock(context.*member(RRefMutex{}));
        rrefs["owners"] = (context.*member(Owners{})).size();
        rrefs["pending_owners"] = (context.*member(PendingOwners{})).size();
        rrefs["forks"] = (context.*member(Forks{})).size();
        rrefs["pending_users"] = (context.*member(PendingUsers{})).size();
        rrefs["confirmed_users"] = (context.*member(ConfirmedUsers{})).size();
        rrefs["pending_children"] = (context.*member(PendingChildren{})).size();
        rrefs["pending_futures"] = (context.*member(PendingFutures{})).load();
      }
    }
    py::dict pending;
    for (auto& [id, count] : pipes)
      pending[py::int_(id)] = count;
    py::dict found;
    found["pending_responses"] = pending;
    found["timeout_entries"] = timeouts;
    found["timed_messages"] = timed_messages;
    found["retries"] = retries;
    found["client_active_calls"] = client;
    found["server_active_calls"] = server;
    found["server_active_async_calls"] = server_async;
    found["waiting_messages"] = waiting;
    found["unfinished_writes"] = unfinished_writes_->load();
    found["pool_tasks"] = tasks;
    for (auto& [name, count] : rrefs)
      found[py::str(name)] = count;
    return found;
  }

 protected:
  void pipeWrite(
      const std::shared_ptr<tensorpipe::Pipe>& pipe,
      MessageArgument message,
      std::vector<c10::Device>&& devices,
      std::vector<c10::Stream> streams,
      WriteCallback callback) noexcept override {
    if (message->isRequest() && sending)
      write_request(pipe, message, std::move(devices), std::move(streams), std::move(callback));
    else
      write_response(pipe, message, std::move(devices), std::move(streams), std::move(callback));
  }

 private:
  using PipePtr = std::shared_ptr<tensorpipe::Pipe>;

  /* How many ids the agents before this one took, in a process that shut RPC down
     and came back. */
  static std::atomic<uint64_t>& ids_used() {
    static std::atomic<uint64_t> used{0};
    return used;
  }

  std::atomic<uint64_t>& next_id() {
    return this->*member(NextId{});
  }

  /* The number in the cluster of a rank of this group. */
  int64_t in_cluster(worker_id_t rank) {
    if (rank == rank_)
      return number_;
    std::lock_guard<std::mutex> lock(numbers_mutex_);
    auto known = numbers_.find(rank);
    if (known != numbers_.end())
      return known->second;
    int64_t number = rank;
    try {
      auto key = number_key(rank);
      if (store_->check({key}))
        number = std::stoll(store_->get_to_str(key));
    } catch (const std::exception&) {
      /* The store is gone. */
    }
    return numbers_[rank] = number;
  }

  /* Claims the record of a message, and finds the fault that acts on it.  Both
     under one lock: faults count messages in the order of the ledger. */
  void claim(Sending& now, const Message& message, int64_t receiver, bool is_response) {
    int64_t size = size_of(message);
    std::unique_lock<std::mutex> lock(faults_mutex_, std::defer_lock);
    if (!faults_.empty())
      lock.lock();
    Record unseen{};
    now.record = ledger_->claim();
    Record& record = now.record ? *now.record : unseen;
    record.sender = number_;
    record.receiver = receiver;
    record.type = number_of(message.type());
    record.is_response = is_response;
    record.size = size;
    if (leaving_.load(std::memory_order_relaxed))
      record.flags.fetch_or(kLeaving);
    if (now.is_spared)
      record.flags.fetch_or(kSpared);
    else
      decide(now, record);
  }

  /* torch tries the same Message object again (RpcAgent::sendWithRetries), so
     it still has the id of the last try; a new one has none. */
  void note_retry(Record& record, int64_t id) {
    if (const Record* last = ledger_->find(id)) {
      record.retry = last->retry + 1;
      record.first_id = last->first_id;
    }
  }

  static void identify(Record& record, int64_t id) {
    record.id = id;
    if (record.first_id < 0)
      record.first_id = id;
  }

  /* Which fault acts on a message: the first one in the list.  All count it. */
  void decide(Sending& now, Record& record) {
    for (size_t i = 0; i < faults_.size(); i++) {
      MessageFault& fault = faults_[i];
      if (!fault.pattern.matches(record) || !fault.strikes() || now.action != Action::kNone)
        continue;
      /* A second response is known by the record of the request. */
      if (fault.action == Action::kDuplicate && !now.record)
        continue;
      now.action = fault.action;
      now.seconds = fault.seconds;
      now.waits = fault.waits;
      now.until = fault.until;
      record.fault = i;
      record.action = static_cast<uint8_t>(fault.action);
    }
  }

  void note_failed(Sending& now, Message& message) {
    int64_t id = next_id()++;
    if (now.record) {
      identify(*now.record, id);
      now.record->flags.fetch_or(kFailed);
      now.record->ended_ns.store(now.record->virtual_ns);
      ledger_->publish(now.record);
    }
    message.setId(id); /* so that a retry is known as one */
  }

  /* What FaultyTensorPipeAgent::send returns for a send that it fails. */
  static c10::intrusive_ptr<JitFuture> failed(const Message& message) {
    auto future = c10::make_intrusive<JitFuture>(at::AnyClassType::get());
    future->setError(std::make_exception_ptr(std::runtime_error(makeRPCError(
        c10::str("Send attempt failed intentionally for ", text_of(message)),
        RPCErrorType::INTENTIONAL_FAILURE))));
    return future;
  }

  static void note_end(Ledger& ledger, Record& record, JitFuture& done) {
    uint32_t flags = kAnswered;
    Record* response = ledger.numbered(record.response.load());
    if (done.hasError()) {
      if (getRPCErrorType(done) == RPCErrorType::TIMEOUT)
        flags = kTimedOut | kFailed;
      else if (response && response->type == number_of(MessageType::EXCEPTION))
        flags = kAnswered | kRaised;
      else
        flags = kFailed;
    }
    record.ended_ns.store(now_ns());
    if ((flags & kAnswered) && response) {
      response->ended_ns.store(record.ended_ns.load());
      ledger.note(response, kArrived);
    }
    ledger.note(&record, flags);
  }

  void write_request(
      const PipePtr& pipe,
      const MessagePtr& message,
      std::vector<c10::Device>&& devices,
      std::vector<c10::Stream> streams,
      WriteCallback callback) noexcept {
    Sending& now = *sending;
    sending = nullptr;
    if (now.record)
      identify(*now.record, message->id());
    if (!now.is_spared)
      sleep(now.record, number_of(message->type()));
    ledger_->publish(now.record);
    act(now, pipe, message, std::move(devices), std::move(streams), std::move(callback));
  }

  void write_response(
      const PipePtr& pipe,
      const MessagePtr& message,
      std::vector<c10::Device>&& devices,
      std::vector<c10::Stream> streams,
      WriteCallback callback) noexcept {
    int64_t id = message->id();
    int64_t receiver = id >> kRankShift;
    Record* request = ledger_->find(id);
    Sending now;
    now.is_spared = request && (request->flags.load() & kSpared);
    claim(now, *message, receiver, true);
    if (now.record) {
      now.record->id = now.record->first_id = id;
      now.record->request = ledger_->number_of(request);
    }
    if (!now.is_spared)
      sleep(now.record, number_of(message->type()));
    bool is_written = now.action != Action::kLose;
    /* A request that came twice is answered once: torch's client asserts that
       it knows the id of a response. */
    if (is_written && request && (request->flags.fetch_or(kResponded) & kResponded)) {
      ledger_->note(now.record, kSwallowed);
      ledger_->publish(now.record);
      callback(tensorpipe::Error());
      return;
    }
    if (request && now.record && is_written)
      request->response.store(ledger_->number_of(now.record));
    ledger_->publish(now.record);
    act(now, pipe, message, std::move(devices), std::move(streams), std::move(callback));
  }

  /* As FaultyTensorPipeAgent::pipeWrite: the thread that sends waits. */
  void sleep(Record* record, int type) {
    auto ms = tables().delay_ms(
        this, type, [&](uint32_t part, uint32_t ms) { ledger_->hold_up(record, part, ms); });
    if (ms)
      std::this_thread::sleep_for(std::chrono::milliseconds(ms));
  }

  void act(
      const Sending& now,
      const PipePtr& pipe,
      const MessagePtr& message,
      std::vector<c10::Device>&& devices,
      std::vector<c10::Stream> streams,
      WriteCallback callback) noexcept {
    switch (now.action) {
      case Action::kFail: /* send() has seen to that */
      case Action::kNone:
        write(now.record, pipe, message, devices, streams, std::move(callback));
        return;
      case Action::kLose:
        callback(tensorpipe::Error());
        return;
      case Action::kDuplicate: {
        auto copy = copied(*message);
        write(now.record, pipe, message, devices, streams, std::move(callback));
        write(nullptr, pipe, copy, devices, streams, [](const tensorpipe::Error&) {});
        return;
      }
      case Action::kDelay:
      case Action::kHold:
        write_later(now, pipe, message, devices, streams, std::move(callback));
        return;
    }
  }

  void write(
      Record* record,
      const PipePtr& pipe,
      const MessagePtr& message,
      std::vector<c10::Device> devices,
      std::vector<c10::Stream> streams,
      WriteCallback callback) noexcept {
    unfinished_writes_->fetch_add(1);
    WriteCallback noting = [ledger = ledger_,
                            unfinished = unfinished_writes_,
                            record,
                            callback = std::move(callback)](const tensorpipe::Error& error) {
      if (record && !error)
        record->written_ns.store(now_ns());
      ledger->note(record, error ? kFailed : kWritten);
      callback(error);
      unfinished->fetch_sub(1);
    };
    TensorPipeAgent::pipeWrite(
        pipe, message, std::move(devices), std::move(streams), std::move(noting));
  }

  /* tensorpipeSerialize (tensorpipe_utils.cpp) moves the payload out of what it
     writes, so whatever is written again, or later, must be another object. */
  static MessagePtr copied(const Message& message) {
    return c10::make_intrusive<Message>(
        std::vector<char>(message.payload()),
        std::vector<torch::Tensor>(message.tensors()),
        message.type(),
        message.id());
  }

  void write_later(
      const Sending& now,
      const PipePtr& pipe,
      const MessagePtr& message,
      std::vector<c10::Device> devices,
      std::vector<c10::Stream> streams,
      WriteCallback callback) noexcept {
    /* torch gives the same object another id when it tries it again. */
    auto copy = copied(*message);
    auto waiting = std::make_shared<Waiting>();
    waiting->record = now.record;
    waiting->held = now.action == Action::kHold && now.waits;
    waiting->until = now.until;
    waiting->write = [this, record = now.record, pipe, copy, devices, streams, callback] {
      write(record, pipe, copy, devices, streams, callback);
    };
    bool is_request = message->isRequest();
    waiting->discard = [is_request, callback] {
      /* Its caller waits for it; the receiver of a response is told nothing. */
      if (is_request)
        callback(tensorpipe::Error(std::make_shared<ShutDown>(), __FILE__, __LINE__));
    };
    later_.put(std::move(waiting), now.seconds);
  }

  const worker_id_t rank_;
  const int64_t number_; /* in the cluster */
  const c10::intrusive_ptr<::c10d::Store> store_;
  std::mutex numbers_mutex_;
  std::map<worker_id_t, int64_t> numbers_;
  const std::shared_ptr<Ledger> ledger_;
  std::mutex faults_mutex_;
  std::vector<MessageFault> faults_;
  Later later_;
  int table_;
  std::atomic<bool> leaving_{false};
  /* Writes whose end TensorPipe has not told; it may tell that later than we live. */
  const std::shared_ptr<std::atomic<int64_t>> unfinished_writes_ =
      std::make_shared<std::atomic<int64_t>>(0);
};

} // namespace rpcprops

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace rpcprops;
  py::module_ rpc = py::module_::import("torch._C._distributed_rpc");

  py::class_<WireRpcBackendOptions, std::shared_ptr<WireRpcBackendOptions>>(
      module, "WireRpcBackendOptions", rpc.attr("_TensorPipeRpcBackendOptionsBase"))
      .def(
          py::init<
              int,
              float,
              std::string,
              std::vector<std::string>,
              std::unordered_map<std::string, float>,
              int,
              std::vector<py::dict>,
              int,
              int>(),
          py::arg("num_worker_threads"),
          py::arg("rpc_timeout"),
          py::arg("init_method"),
          py::arg("messages_to_fail"),
          py::arg("messages_to_delay"),
          py::arg("num_fail_sends"),
          py::arg("message_faults"),
          py::arg("ledger_fd"),
          py::arg("number") = -1)
      .def_readwrite("num_worker_threads", &WireRpcBackendOptions::numWorkerThreads)
      .def_readonly("messages_to_fail", &WireRpcBackendOptions::messages_to_fail)
      .def_readonly("messages_to_delay", &WireRpcBackendOptions::messages_to_delay)
      .def_readonly("num_fail_sends", &WireRpcBackendOptions::num_fail_sends);

  py::class_<WireAgent, std::shared_ptr<WireAgent>>(
      module, "WireAgent", rpc.attr("TensorPipeAgent"))
      .def(
          py::init([](const c10::intrusive_ptr<::c10d::Store>& store,
                      std::string name,
                      worker_id_t rank,
                      std::optional<int> world_size,
                      const WireRpcBackendOptions& options) {
            py::gil_scoped_release release;
            auto ledger = std::make_shared<Ledger>(options.ledger_fd);
            OtherNumber told(store, rank, options);
            std::shared_ptr<WireAgent> agent(
                new WireAgent(store, std::move(name), rank, world_size, options, ledger),
                torch::impl::destroy_without_gil<WireAgent>);
            told.is_kept = true;
            return agent;
          }),
          py::arg("store"),
          py::arg("name"),
          py::arg("rank"),
          py::arg("world_size"),
          py::arg("options"))
      .def("rearm", &WireAgent::rearm)
      .def("leave", &WireAgent::leave)
      .def("state", &WireAgent::state);

  module.def("spare", [](const std::string& name) { spared = type_named(name); });
  module.def("counts", [] { return tables().counts(); });
  module.def("counts_of", [](int number) { return tables().counts_of(number); });
  module.def("disarm", [](int number) { tables().disarm(number); });
  module.def(
      "arm",
      [](const std::vector<std::string>& fails,
         int64_t num_fail_sends,
         const std::unordered_map<std::string, float>& delays,
         uint32_t part) {
        return tables().arm(fails, num_fail_sends, delays, part, nullptr);
      });
}
