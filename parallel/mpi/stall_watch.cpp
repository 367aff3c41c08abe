#include "parallel/mpi/stall_watch.h"

#include <fmt/format.h>
#include <pthread.h>
#include <signal.h>  // pthread_sigmask

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>
#include <tuple>
#include <type_traits>
#include <utility>

#include "parallel/errors.h"
#include "parallel/mpi/mpi_check.h"
#include "parallel/mpi/peer_process.h"

namespace megatron_cpp::parallel {
namespace {

using Clock = PeerPatience::Clock;
using internal::CollectiveRecord;

static_assert(std::is_trivially_copyable_v<RankActivity>, "sent as bytes");

/// What a message is; its MPI tag. All begin with the number that the asking rank has given its question.
enum class Kind : int {
  kRequest,  ///< to the rank that is to collect: nothing more
  kHeard,    ///< to the one that requested: it is being collected
  kTable,    ///< to the one that requested: a RankActivity of each rank
  kAsk,      ///< to each rank: nothing more
  kAnswer,   ///< to the one that asked: a RankActivity
  kPrinted,  ///< to each rank: the sender prints a report
};

std::weak_ptr<StallWatch>& of_this_process() {
  static auto& watch = *new std::weak_ptr<StallWatch>;
  return watch;
}

std::string_view text(const auto& letters) { return letters.data(); }

/// Whether two ranks of a group do different things in the same place.
bool differ(const CollectiveRecord& a, const CollectiveRecord& b) {
  if (text(a.operation) != text(b.operation)) return true;
  return a.elements != b.elements && !a.sizes_may_differ;
}

}  // namespace

std::string stall_report(const std::vector<RankActivity>& ranks) {
  std::string report;
  // By group, its first rank, and number.
  std::map<std::tuple<std::string, int, int64_t>, std::vector<std::pair<size_t, CollectiveRecord>>> places;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const auto& [has_answered, state, activity] = ranks[rank];
    if (!has_answered) {
      const auto why = state.front() == 0 ? std::string{} : fmt::format(" ({})", state.data());
      report += fmt::format("  rank {}: silent{}\n", rank, why);
      continue;
    }
    report += fmt::format("  rank {} (host {}): {}\n", rank, activity.host.data(), to_text(activity));
    for (const auto& last : activity.latest) {
      if (last.number >= 0) places[{last.group.data(), last.first_rank, last.number}].emplace_back(rank, last);
    }
  }
  for (const auto& [place, entries] : places) {
    const auto& [first_rank, first] = entries.front();
    const auto other = std::find_if(entries.begin(), entries.end(),
                                    [&first = first](const auto& entry) { return differ(first, entry.second); });
    if (other == entries.end()) continue;
    report += fmt::format("  ranks {} and {} differ: {}; {}\n", first_rank, other->first, to_text(first),
                          to_text(other->second));
  }
  return report;
}

class StallWatch::Thread {
 public:
  explicit Thread(const MpiCommunicator& world)
      : communicator_(world.duplicate()), processes_(processes_of(world)), own_rank_(world.rank()) {
    // Signals are for the program's threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  ~Thread() {
    set([this] { ends_ = true; });
    thread_.join();
    // Those that a stopped rank hasn't taken: MPI still reads them.
    for (auto& message : outgoing_) {
      MPI_Request_free(&message->request);
      never_freed().push_back(std::move(message));
    }
  }

  std::vector<RankActivity> ask() {
    const std::scoped_lock one_at_a_time(asking_);
    set([this] {
      is_asked_ = true;
      table_.clear();
    });
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !is_asked_ || has_failed_; });
    return table_;
  }

  void watch(std::chrono::milliseconds timeout) {
    set([&] { timeout_ = timeout; });
  }

 private:
  struct Outgoing {
    std::vector<std::byte> bytes;
    MPI_Request request = MPI_REQUEST_NULL;
  };
  /// Reachable for leak checkers.
  static std::vector<std::unique_ptr<Outgoing>>& never_freed() {
    static auto& messages = *new std::vector<std::unique_ptr<Outgoing>>;
    return messages;
  }
  /// This rank's question to the one that collects.
  struct Request {
    int64_t number;
    int collector;
    bool is_heard;
    Clock::time_point begin;
    PeerPatience patience;
  };
  /// The questions of this rank, which collects, to all.
  struct Collection {
    int64_t number;
    std::vector<RankActivity> answers;
    std::vector<PeerPatience> patience;  ///< of each rank
    std::vector<std::pair<int, int64_t>> asked_by;
    Clock::time_point next_look;
  };

  template <class Change>
  void set(const Change& change) {
    {
      const std::scoped_lock lock(mutex_);
      change();
    }
    changed_.notify_all();
  }

  void run() {
    constexpr auto kIdle = std::chrono::milliseconds(50);
    constexpr auto kBusy = std::chrono::milliseconds(2);
    try {
      for (;;) {
        {
          std::unique_lock lock(mutex_);
          changed_.wait_for(lock, request_ || collection_ ? kBusy : kIdle,
                            [this] { return ends_ || (is_asked_ && !request_); });
          if (ends_) return;
          if (is_asked_ && !request_) request_to(0);
        }
        receive_all();
        go_on_with_request();
        go_on_with_collection();
        look_for_a_stall();
        forget_sent();
      }
    } catch (const std::exception& error) {
      std::fputs(fmt::format("[rank {}] can't watch for stalled ranks: {}\n", own_rank_, error_text(error)).c_str(),
                 stderr);
      set([this] { has_failed_ = true; });
    }
  }

  /// Asks `rank` to collect the answers of all.
  void request_to(int rank) {
    const auto now = Clock::now();
    request_.emplace(
        Request{next_number_++, rank, false, now, PeerPatience(processes_[static_cast<size_t>(rank)], now)});
    send(Kind::kRequest, rank, request_->number);
  }

  void send(Kind kind, int rank, int64_t number, const void* data = nullptr, size_t bytes = 0) {
    if (rank == own_rank_) {
      take(kind, rank, number, static_cast<const std::byte*>(data), bytes);
      return;
    }
    auto message = std::make_unique<Outgoing>();
    message->bytes.resize(sizeof(number) + bytes);
    std::memcpy(message->bytes.data(), &number, sizeof(number));
    if (bytes > 0) std::memcpy(message->bytes.data() + sizeof(number), data, bytes);
    MCPP_MPI_CHECK(MPI_Isend(message->bytes.data(), static_cast<int>(message->bytes.size()), MPI_BYTE, rank,
                             static_cast<int>(kind), communicator_.get(), &message->request));
    outgoing_.push_back(std::move(message));
  }

  void receive_all() {
    // MPI_Iprobe may only take in what has come, which the next one then finds.
    for (int num_empty = 0; num_empty < 3;) {
      int has_arrived = 0;
      MPI_Status status;
      MCPP_MPI_CHECK(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, communicator_.get(), &has_arrived, &status));
      if (has_arrived == 0) {
        ++num_empty;
        continue;
      }
      num_empty = 0;
      int count = 0;
      MCPP_MPI_CHECK(MPI_Get_count(&status, MPI_BYTE, &count));
      std::vector<std::byte> bytes(static_cast<size_t>(count));
      MCPP_MPI_CHECK(MPI_Recv(bytes.data(), count, MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG, communicator_.get(),
                              MPI_STATUS_IGNORE));
      int64_t number = 0;
      std::memcpy(&number, bytes.data(), sizeof(number));
      take(static_cast<Kind>(status.MPI_TAG), status.MPI_SOURCE, number, bytes.data() + sizeof(number),
           bytes.size() - sizeof(number));
    }
  }

  void take(Kind kind, int from, int64_t number, const std::byte* data, size_t bytes) {
    switch (kind) {
      case Kind::kRequest:
        waiting_.emplace_back(from, number);
        send(Kind::kHeard, from, number);
        break;
      case Kind::kHeard:
        if (request_ && request_->number == number) request_->is_heard = true;
        break;
      case Kind::kAsk: {
        RankActivity own{.has_answered = true, .activity = internal::own_activity()};
        send(Kind::kAnswer, from, number, &own, sizeof(own));
        break;
      }
      case Kind::kAnswer:
        if (collection_ && collection_->number == number) {
          std::memcpy(&collection_->answers[static_cast<size_t>(from)], data, sizeof(RankActivity));
        }
        break;
      case Kind::kTable:
        if (!request_ || request_->number != number) break;
        request_.reset();
        set([&] {
          table_.resize(bytes / sizeof(RankActivity));
          std::memcpy(table_.data(), data, bytes);
          is_asked_ = false;
        });
        break;
      case Kind::kPrinted:
        printed_ = Clock::now();
        break;
    }
  }

  /// Turns to the next rank if the one that is to collect doesn't answer.
  void go_on_with_request() {
    if (!request_ || request_->collector == own_rank_) return;
    const auto now = Clock::now();
    bool is_over = request_->patience.is_over(now);
    // It may have to wait for others itself.
    if (request_->is_heard) is_over = !request_->patience.seen().empty() || now - request_->begin > kLongest;
    if (is_over) request_to(request_->collector + 1);
  }

  void go_on_with_collection() {
    const auto now = Clock::now();
    if (!collection_) {
      if (waiting_.empty()) return;
      collection_.emplace();
      collection_->number = next_number_++;
      collection_->answers.resize(processes_.size());
      collection_->asked_by = std::exchange(waiting_, {});
      for (const auto& process : processes_) collection_->patience.emplace_back(process, now);
      for (size_t rank = 0; rank < processes_.size(); ++rank) {
        send(Kind::kAsk, static_cast<int>(rank), collection_->number);
      }
    }
    auto& answers = collection_->answers;
    bool all_here = true;
    for (const auto& answer : answers) all_here = all_here && answer.has_answered;
    if (!all_here) {
      if (now < collection_->next_look) return;
      collection_->next_look = now + std::chrono::milliseconds(20);
      bool somebody_may_answer = false;
      for (size_t rank = 0; rank < answers.size(); ++rank) {
        if (answers[rank].has_answered) continue;
        auto& patience = collection_->patience[rank];
        somebody_may_answer = !patience.is_over(now) || somebody_may_answer;
        answers[rank].state = {};
        patience.seen().copy(answers[rank].state.data(), answers[rank].state.size() - 1);
      }
      if (somebody_may_answer) return;
    }
    print_report();
    const auto done = std::move(*collection_);
    collection_.reset();
    for (const auto& [rank, number] : done.asked_by) {
      send(Kind::kTable, rank, number, done.answers.data(), done.answers.size() * sizeof(RankActivity));
    }
  }

  void print_report() {
    const auto now = Clock::now();
    if (printed_ && now - *printed_ < std::chrono::seconds(30)) return;
    const auto text = fmt::format("rank {} has waited too long. What every rank is doing:\n{}",
                                  collection_->asked_by.front().first, stall_report(collection_->answers));
    // Others may have to collect, too: when this rank has ended, or when a stopped one that was asked first goes on.
    // Sent first, since whoever reads the report may end this process.
    for (size_t rank = 0; rank < processes_.size(); ++rank) send(Kind::kPrinted, static_cast<int>(rank), 0);
    std::fputs(text.c_str(), stderr);
    std::fflush(stderr);
  }

  void look_for_a_stall() {
    constexpr auto kGrace = std::chrono::seconds(2);
    std::optional<std::chrono::milliseconds> timeout;
    {
      const std::scoped_lock lock(mutex_);
      timeout = timeout_;
    }
    const auto last = timeout ? internal::last_collective_event() : std::nullopt;
    if (!last || last == reported_ || Clock::now() - *last < *timeout + kGrace || request_) return;
    reported_ = last;
    request_to(0);
  }

  void forget_sent() {
    std::erase_if(outgoing_, [](const std::unique_ptr<Outgoing>& message) {
      int is_sent = 0;
      MCPP_MPI_CHECK(MPI_Test(&message->request, &is_sent, MPI_STATUS_IGNORE));
      return is_sent != 0;
    });
  }

  static constexpr auto kLongest = std::chrono::seconds(90);

  MpiCommunicator communicator_;
  std::vector<PeerProcess> processes_;  ///< of each rank
  int own_rank_;

  // Of the thread alone.
  int64_t next_number_ = 0;
  std::optional<Request> request_;
  std::optional<Collection> collection_;
  std::vector<std::pair<int, int64_t>> waiting_;  ///< ranks and their numbers, for the next collection
  std::vector<std::unique_ptr<Outgoing>> outgoing_;
  std::optional<Clock::time_point> printed_;   ///< by any rank
  std::optional<Clock::time_point> reported_;  ///< the last collective event that was reported as a stall

  std::mutex asking_;  ///< held by the one that asks
  std::mutex mutex_;   ///< of what follows
  std::condition_variable changed_;
  bool ends_ = false;
  bool has_failed_ = false;
  bool is_asked_ = false;
  std::vector<RankActivity> table_;
  std::optional<std::chrono::milliseconds> timeout_;
  std::thread thread_;
};

std::shared_ptr<StallWatch> StallWatch::of_process(const MpiCommunicator& world) {
  auto watch = of_this_process().lock();
  if (!watch) {
    watch = std::make_shared<StallWatch>(world);
    of_this_process() = watch;
  }
  return watch;
}

std::shared_ptr<StallWatch> StallWatch::existing() { return of_this_process().lock(); }

StallWatch::StallWatch(const MpiCommunicator& world) : thread_(std::make_unique<Thread>(world)) {}

StallWatch::~StallWatch() = default;

std::vector<RankActivity> StallWatch::ask() { return thread_->ask(); }

void StallWatch::watch(std::chrono::milliseconds timeout) { thread_->watch(timeout); }

}  // namespace megatron_cpp::parallel
