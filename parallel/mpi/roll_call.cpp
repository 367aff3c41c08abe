#include "parallel/mpi/roll_call.h"

#include <fmt/format.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string_view>

#include "parallel/mpi/mpi_check.h"

namespace megatron_cpp::parallel {
namespace {

constexpr int kAsk = 1;
constexpr int kAnswer = 2;

}  // namespace

RollCall::RollCall(const MpiCommunicator& communicator)
    : communicator_(communicator.duplicate()),
      processes_(processes_of(communicator)),
      heard_(static_cast<size_t>(communicator.size())) {}

RollCall::Message RollCall::message(const CollectiveCall& call, int64_t about) {
  Message result{.number = call.number, .about = about, .elements = call.elements};
  const std::string_view name(call.operation);
  name.copy(result.operation.data(), result.operation.size() - 1);
  return result;
}

void RollCall::send(const Message& message, int rank, int tag) {
  // Never freed, but reachable for leak checkers: MPI reads it until the receiver, which may be stopped, takes it.
  static auto& kept = *new std::vector<std::unique_ptr<Message>>;
  kept.push_back(std::make_unique<Message>(message));
  MPI_Request request = MPI_REQUEST_NULL;
  MCPP_MPI_CHECK(MPI_Isend(kept.back().get(), sizeof(Message), MPI_BYTE, rank, tag, communicator_.get(), &request));
  MCPP_MPI_CHECK(MPI_Request_free(&request));
}

int RollCall::receive(Message& message, int tag) {
  int arrived = 0;
  MPI_Status status;
  MCPP_MPI_CHECK(MPI_Iprobe(MPI_ANY_SOURCE, tag, communicator_.get(), &arrived, &status));
  if (arrived == 0) return -1;
  MCPP_MPI_CHECK(MPI_Recv(&message, sizeof(Message), MPI_BYTE, status.MPI_SOURCE, tag, communicator_.get(), &status));
  return status.MPI_SOURCE;
}

void RollCall::answer(const CollectiveCall& call) {
  Message question;
  for (int rank = receive(question, kAsk); rank >= 0; rank = receive(question, kAsk)) {
    send(message(call, question.number), rank, kAnswer);
    // The asking rank waits in that collective, unless it is an earlier one, which that rank has given up.
    if (question.number >= call.number) heard_[static_cast<size_t>(rank)] = question;
  }
}

std::string RollCall::reason(const CollectiveCall& call) {
  const int own_rank = communicator_.rank();
  const auto size = static_cast<int>(heard_.size());
  for (int rank = 0; rank < size; ++rank) {
    auto& heard = heard_[static_cast<size_t>(rank)];
    if (heard && heard->number < call.number) heard.reset();
    if (rank != own_rank) send(message(call, call.number), rank, kAsk);
  }
  using Clock = PeerPatience::Clock;
  const auto begin = Clock::now();
  std::vector<PeerPatience> patience;
  patience.reserve(processes_.size());
  for (const auto& process : processes_) patience.emplace_back(process, begin);
  const auto missing = [&] {
    std::vector<int> ranks;
    for (int rank = 0; rank < size; ++rank) {
      if (rank != own_rank && !heard_[static_cast<size_t>(rank)]) ranks.push_back(rank);
    }
    return ranks;
  };
  const auto somebody_may_answer = [&] {
    const auto ranks = missing();
    const auto now = Clock::now();
    // Not any_of: is_over() must look at every process.
    return std::count_if(ranks.begin(), ranks.end(),
                         [&](int rank) { return !patience[static_cast<size_t>(rank)].is_over(now); }) > 0;
  };
  auto next_look = begin;
  bool goes_on = true;
  while (goes_on) {
    answer(call);
    Message reply;
    for (int rank = receive(reply, kAnswer); rank >= 0; rank = receive(reply, kAnswer)) {
      if (reply.about == call.number) heard_[static_cast<size_t>(rank)] = reply;
    }
    sched_yield();
    if (missing().empty()) break;
    if (Clock::now() < next_look) continue;
    next_look = Clock::now() + std::chrono::milliseconds(20);
    goes_on = somebody_may_answer();
  }
  if (const auto silent = missing(); !silent.empty()) return silent_ranks(silent, call.communicator);
  for (int rank = 0; rank < size; ++rank) {
    const auto& heard = heard_[static_cast<size_t>(rank)];
    if (rank == own_rank) continue;
    const bool is_here = heard->number == call.number && std::string_view(heard->operation.data()) == call.operation;
    if (is_here && heard->elements == call.elements) continue;
    return fmt::format("rank {} waits in {} of {} elements", rank, heard->operation.data(), heard->elements);
  }
  return "every rank waits in it, so the messages between them are lost or too slow";
}

bool PeerWait::go_on() {
  constexpr auto kAnswerEvery = std::chrono::milliseconds(20);
  if (spins_ > 0) {
    --spins_;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    return true;
  }
  sched_yield();
  const auto now = Clock::now();
  if (!begin_) {
    begin_ = now;
    next_answer_ = now + kAnswerEvery;
  }
  if (now > next_answer_) {
    call_.roll_call->answer(call_);
    next_answer_ = now + kAnswerEvery;
  }
  return now - *begin_ <= call_.timeout;
}

}  // namespace megatron_cpp::parallel
