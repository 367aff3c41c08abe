// Reductions through the memory that ranks of one host share: the bits of a plain sum in the order of the ranks, at
// every size, and what happens when the memory or a rank isn't there.
#include "parallel/mpi/shared_window.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <fstream>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "parallel/collectives.h"
#include "parallel/mpi/mpi_backend.h"
#include "tests/support/errors.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::parallel {
namespace {

using c10d::ReduceOp;
using namespace test_support;

constexpr int64_t kThreshold = 1 << 14;  // bytes; mpi_backend.cpp
constexpr std::array kDtypes = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf,
                                at::kLong,  at::kInt,    at::kByte,     at::kBool};
constexpr std::array kReductions = {ReduceOp::SUM, ReduceOp::AVG, ReduceOp::PRODUCT, ReduceOp::MIN, ReduceOp::MAX};

/// Numbers of any magnitude, so that floating-point sums depend on their order. They differ by rank and by index, up to
/// a period that is prime: no two chunks are alike.
at::Tensor numbers(int64_t elements, int64_t seed, at::ScalarType dtype) {
  constexpr int64_t kPeriod = 8191;
  const auto index = at::arange(std::min(kPeriod, elements), at::kLong);
  auto values = (index * 7 + seed * 13 + 1).remainder(31);
  if (at::isFloatingType(dtype)) {
    const auto angle = index.to(at::kDouble) * 0.7 + static_cast<double>(seed) + 1;
    values = at::sin(angle) * at::pow(10.0, (index + 3 * seed).remainder(7) - 3);
  } else if (dtype == at::kBool) {
    values = values.remainder(3).eq(0);
  }
  return values.to(dtype).repeat({elements / kPeriod + 1}).narrow(0, 0, elements).contiguous();
}

std::vector<at::Tensor> of_all(int t, int64_t elements, at::ScalarType dtype) {
  std::vector<at::Tensor> all;
  for (int rank = 0; rank < t; ++rank) all.push_back(numbers(elements, rank, dtype));
  return all;
}

/// One rank after the other, each sum a new tensor.
at::Tensor naive(const std::vector<at::Tensor>& all, ReduceOp::RedOpType reduction) {
  const auto dtype = all.front().scalar_type();
  const bool is_half = at::isReducedFloatingType(dtype);
  const auto wide = [&](const at::Tensor& tensor) { return is_half ? tensor.to(at::kFloat) : tensor; };
  auto result = wide(all.front());
  for (size_t rank = 1; rank < all.size(); ++rank) {
    const auto part = wide(all[rank]);
    if (reduction == ReduceOp::PRODUCT) {
      result = result * part;
    } else if (reduction == ReduceOp::MIN) {
      result = at::minimum(result, part);
    } else if (reduction == ReduceOp::MAX) {
      result = at::maximum(result, part);
    } else {
      result = dtype == at::kBool ? at::logical_or(result, part) : result + part;
    }
  }
  if (reduction == ReduceOp::AVG) result = result / static_cast<int64_t>(all.size());
  return result.to(dtype);
}

bool is_defined(ReduceOp::RedOpType reduction, at::ScalarType dtype) {
  return reduction != ReduceOp::AVG || at::isFloatingType(dtype);
}

c10::intrusive_ptr<c10d::Backend> backend_of(int t) { return groups(t).tp->getBackend(c10::DeviceType::CPU); }

/// A backend of this rank's tensor-parallel group of size t, apart from the groups that the other tests use.
c10::intrusive_ptr<MpiBackend> new_backend(int t, const MpiBackendOptions& options) {
  const int color = groups(t).grid.group_index_of(runtime().rank(), "tp");
  return c10::make_intrusive<MpiBackend>(runtime().world().split(color), "apart", options);
}

void all_reduce(c10d::Backend& backend, at::Tensor& tensor, ReduceOp::RedOpType reduction) {
  c10d::AllreduceOptions options;
  options.reduceOp = reduction;
  std::vector<at::Tensor> tensors{tensor};
  backend.allreduce(tensors, options)->wait();
}

void reduce_scatter(c10d::Backend& backend, at::Tensor& output, at::Tensor& input, ReduceOp::RedOpType reduction) {
  c10d::ReduceScatterOptions options;
  options.reduceOp = reduction;
  backend._reduce_scatter_base(output, input, options)->wait();
}

/// Both reductions of `elements` per rank (of a reduce-scatter: of the next multiple of t) have the naive bits.
void expect_naive_bits(c10d::Backend& backend, int64_t elements, at::ScalarType dtype, ReduceOp::RedOpType reduction) {
  const int t = backend.getSize();
  const int64_t share = (elements + t - 1) / t;
  const auto all = of_all(t, share * t, dtype);
  const auto expected = naive(all, reduction);
  const auto& mine = all[static_cast<size_t>(backend.getRank())];

  auto tensor = mine.narrow(0, 0, elements).clone();
  all_reduce(backend, tensor, reduction);
  EXPECT_TRUE(test_support::equal(tensor, expected.narrow(0, 0, elements)))
      << "all_reduce of " << elements << " " << dtype << ", reduction " << static_cast<int>(reduction) << ", t " << t;

  auto input = mine.clone();
  auto output = at::empty({share}, dtype);
  reduce_scatter(backend, output, input, reduction);
  EXPECT_TRUE(test_support::equal(output, expected.narrow(0, backend.getRank() * share, share)))
      << "reduce_scatter of " << share * t << " " << dtype << ", reduction " << static_cast<int>(reduction) << ", t "
      << t;
  EXPECT_TRUE(test_support::equal(input, mine)) << "the input was written to";
}

/// A tensor of every second element of its memory.
at::Tensor strided(const at::Tensor& values) {
  auto result = at::zeros({2 * values.numel()}, values.options()).slice(0, 0, 2 * values.numel(), 2);
  result.copy_(values);
  return result;
}

template <class Action>
std::string backend_error(const Action& action) {
  return test_support::error_of<c10::DistBackendError>(action);
}

std::string where(const c10d::Backend& backend) {
  return "(group apart, rank " + std::to_string(backend.getRank()) + " of " + std::to_string(backend.getSize()) + ")";
}

int occurrences(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

constexpr int64_t kLarge = 50001;  // elements; not divisible by 2 or 4, through the window in every dtype

}  // namespace

TEST(SharedWindow, HasTheBitsOfANaiveSumInEveryDtypeAndReduction) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : kDtypes) {
      for (const auto reduction : kReductions) {
        if (is_defined(reduction, dtype)) expect_naive_bits(*backend_of(t), kLarge, dtype, reduction);
      }
    }
  }
}

// A step takes part_bytes to each rank: sizes about none, one and a few steps, and about the threshold.
TEST(SharedWindow, HasTheBitsOfANaiveSumAtEverySize) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kByte}) {
      const auto width = static_cast<int64_t>(at::elementSize(dtype));
      const int64_t threshold = kThreshold / width;
      const int64_t step = SharedWindow::part_bytes_for(t) / width * t;
      for (const int64_t elements :
           {int64_t{0}, int64_t{1}, threshold - 1, threshold, threshold + 1, step - 1, step, step + 1, step + t - 1,
            2 * step - 3, 3 * step, 4 * step + 7, 5 * step + 2 * t + 1}) {
        expect_naive_bits(*backend_of(t), elements, dtype, ReduceOp::SUM);
      }
    }
  }
}

// Shares are rounded up to cache lines: the last ranks may have few elements or none.
TEST(SharedWindow, TakesSharesOfNothing) {
  for (const int t : test_support::divisors_of_world()) {
    const auto backend = new_backend(t, {.timeout = std::chrono::seconds(60)});
    for (int64_t elements = kThreshold; elements < kThreshold + 3 * 64 * t; elements += 17) {
      auto tensor = numbers(elements, backend->getRank(), at::kByte);
      all_reduce(*backend, tensor, ReduceOp::SUM);
      EXPECT_TRUE(test_support::equal(tensor, naive(of_all(t, elements, at::kByte), ReduceOp::SUM))) << elements;
    }
  }
}

TEST(SharedWindow, TakesStridedTensors) {
  for (const int t : test_support::divisors_of_world()) {
    const auto backend = backend_of(t);
    const int64_t elements = kLarge * t;
    const auto all = of_all(t, elements, at::kFloat);
    const auto expected = naive(all, ReduceOp::SUM);
    auto input = strided(all[static_cast<size_t>(backend->getRank())]);
    auto output = strided(at::zeros({kLarge}));
    reduce_scatter(*backend, output, input, ReduceOp::SUM);
    EXPECT_TRUE(test_support::equal(output, expected.narrow(0, backend->getRank() * kLarge, kLarge)));
    all_reduce(*backend, input, ReduceOp::SUM);
    EXPECT_TRUE(test_support::equal(input, expected));
  }
}

// The output as any part of the input, also one that other ranks still need.
TEST(SharedWindow, ReducesIntoItsInput) {
  for (const int t : test_support::divisors_of_world()) {
    const auto backend = backend_of(t);
    const int64_t share = 300001;
    const auto all = of_all(t, share * t, at::kFloat);
    const auto expected = naive(all, ReduceOp::SUM).narrow(0, backend->getRank() * share, share);
    for (int which = 0; which < t; ++which) {
      auto input = all[static_cast<size_t>(backend->getRank())].clone();
      auto output = input.narrow(0, which * share, share);
      reduce_scatter(*backend, output, input, ReduceOp::SUM);
      EXPECT_TRUE(test_support::equal(output, expected)) << which << " of " << t;
    }
  }
}

TEST(SharedWindow, RefusesReductionsItHasNot) {
  for (const int t : test_support::divisors_of_world()) {
    for (const auto& [reduction, dtype] : {std::pair{ReduceOp::BXOR, at::kInt}, std::pair{ReduceOp::AVG, at::kLong}}) {
      for (const int64_t elements : {int64_t{3}, kLarge}) {
        auto input = at::ones({elements * t}, dtype);
        auto output = at::ones({elements}, dtype);
        EXPECT_THROW(all_reduce(*backend_of(t), input, reduction), c10::ValueError);
        EXPECT_THROW(reduce_scatter(*backend_of(t), output, input, reduction), c10::ValueError);
      }
    }
  }
}

// Both groups of a rank, in turn; each has a window of its own and other peers.
TEST(SharedWindow, SeveralGroupsTakeTurns) {
  for (const int t : test_support::divisors_of_world()) {
    const auto& parallel_groups = groups(t);
    const int world_rank = runtime().rank();
    for (int64_t turn = 0; turn < 6; ++turn) {
      const int64_t elements = kLarge + 70001 * turn;
      for (const auto& [group, dims] : {std::pair{parallel_groups.tp, "tp"}, std::pair{parallel_groups.dp, "dp"},
                                        std::pair{parallel_groups.world, "tp-dp"}}) {
        std::vector<at::Tensor> all;
        for (const int peer : parallel_groups.grid.group_of(world_rank, dims)) {
          all.push_back(numbers(elements, peer + turn, at::kFloat));
        }
        const auto result = all_reduce(numbers(elements, world_rank + turn, at::kFloat), group);
        EXPECT_TRUE(test_support::equal(result, naive(all, ReduceOp::SUM))) << dims << ", turn " << turn;
      }
    }
  }
}

// Races show when ranks drift apart: each waits now and then, for a time of its own.
TEST(SharedWindow, ManyReductionsOfChangingKindsAndSizes) {
  for (const int t : test_support::divisors_of_world()) {
    const auto backend = backend_of(t);
    std::mt19937 same_everywhere(17);
    std::mt19937 own_pace(static_cast<unsigned>(runtime().rank()));
    constexpr std::array kSizes = {int64_t{5}, kThreshold, int64_t{40009}, int64_t{150001}, int64_t{600011}};
    for (int64_t turn = 0; turn < 150; ++turn) {
      const int64_t share = kSizes[same_everywhere() % kSizes.size()] / t;
      const auto dtype = kDtypes[same_everywhere() % 3];
      const auto kind = same_everywhere() % 3;
      std::vector<at::Tensor> all;
      for (int rank = 0; rank < t; ++rank) {
        all.push_back(numbers(share * t, rank + 5 * turn, dtype));
      }
      auto input = all[static_cast<size_t>(backend->getRank())].clone();
      if (own_pace() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own_pace() % 300));
      if (kind == 0) {
        all_reduce(*backend, input, ReduceOp::SUM);
        EXPECT_TRUE(test_support::equal(input, naive(all, ReduceOp::SUM))) << "turn " << turn << ", t " << t;
      } else if (kind == 1) {
        auto output = at::empty({share}, dtype);
        reduce_scatter(*backend, output, input, ReduceOp::SUM);
        EXPECT_TRUE(test_support::equal(output, naive(all, ReduceOp::SUM).narrow(0, backend->getRank() * share, share)))
            << "turn " << turn << ", t " << t;
      } else {
        EXPECT_TRUE(test_support::equal(all_gather(input, groups(t).tp), at::cat(all)))
            << "turn " << turn << ", t " << t;
      }
    }
  }
}

TEST(SharedWindow, LeavesNoNameBehind) {
  for (const int t : test_support::divisors_of_world()) {
    const auto backend = new_backend(t, {.timeout = std::chrono::seconds(60)});
    auto tensor = at::ones({kLarge});
    all_reduce(*backend, tensor, ReduceOp::SUM);
    int mapped = 0;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      if (line.find("/dev/shm/megatron_cpp-") == std::string::npos) continue;
      ++mapped;
      EXPECT_NE(line.find("(deleted)"), std::string::npos) << line;
    }
    EXPECT_TRUE(t == 1 || mapped > 0);
  }
}

TEST(SharedWindow, StaysSmall) {
  EXPECT_EQ(SharedWindow::part_bytes_for(2), 1 << 17);
  for (const int t : {1, 2, 3, 4, 8, 16, 64, 128}) {
    EXPECT_LE(SharedWindow::bytes_for(t), (1 << 24) + 64 * 1024) << t;
    EXPECT_EQ(SharedWindow::part_bytes_for(t) % 64, 0) << t;
    EXPECT_GE(SharedWindow::part_bytes_for(t), 64) << t;
  }
}

// One rank may have less memory than the others: all go the same way, with the same bits.
TEST(SharedWindow, WithoutMemoryMessagesGiveTheSameBits) {
  for (const int t : test_support::divisors_of_world()) {
    if (t == 1) continue;
    for (const int poor : {0, t - 1}) {
      const bool is_poor = groups(t).tp->getRank() == poor;
      const int64_t enough = SharedWindow::bytes_for(t);
      const auto backend =
          new_backend(t, {.timeout = std::chrono::seconds(60), .shared_memory_limit = is_poor ? enough - 1 : enough});
      testing::internal::CaptureStderr();
      auto tensor = at::ones({kLarge});
      all_reduce(*backend, tensor, ReduceOp::SUM);
      all_reduce(*backend, tensor, ReduceOp::SUM);
      const auto said = testing::internal::GetCapturedStderr();
      const auto message = "group apart, rank 0 of " + std::to_string(t) +
                           ": large reductions go through MPI messages, which is slower: rank " + std::to_string(poor) +
                           " cannot have the " + std::to_string(enough) +
                           " bytes of shared memory (/dev/shm) that a window takes: No space left on device\n";
      EXPECT_EQ(occurrences(said, "large reductions"), backend->getRank() == 0 ? 1 : 0) << said;
      EXPECT_EQ(occurrences(said, message), backend->getRank() == 0 ? 1 : 0) << said;
      for (const auto dtype : kDtypes) {
        for (const auto reduction : kReductions) {
          if (is_defined(reduction, dtype)) expect_naive_bits(*backend, kLarge, dtype, reduction);
        }
      }
    }
  }
}

namespace {

/// `message` blames rank `missing` of the group, or any if there is none, which is in `elsewhere`.
void expect_timed_out(const std::string& message, const std::string& operation, MpiBackend& backend,
                      std::optional<int> missing, const std::string& elsewhere) {
  const auto begin = operation + " elements timed out after 300 ms " + where(backend) + ": rank " +
                     (missing ? std::to_string(*missing) : "");
  EXPECT_EQ(message.find(begin), 0U) << message;
  EXPECT_NE(message.find(" isn't there: in " + elsewhere + " number "), std::string::npos) << message;
}

}  // namespace

// The last rank comes when the others have given up; nobody goes on with what the window then holds.
TEST(SharedWindow, ARankThatDoesNotComeBecomesAnErrorForGood) {
  const int t = runtime().size();
  if (t == 1) return;
  const auto backend = new_backend(t, {.timeout = std::chrono::milliseconds(300)});
  const bool late = backend->getRank() == t - 1;
  auto tensor = at::ones({kLarge});
  auto share = at::ones({kLarge});
  auto input = at::ones({kLarge * t});
  backend->setTimeout(std::chrono::seconds(60));
  all_reduce(*backend, tensor, ReduceOp::SUM);
  backend->setTimeout(std::chrono::milliseconds(300));
  const auto reduce = [&] { all_reduce(*backend, tensor, ReduceOp::SUM); };
  const auto scatter = [&] { reduce_scatter(*backend, share, input, ReduceOp::SUM); };
  const auto failed_before = [&](const std::string& operation) {
    return operation + " elements cannot begin " + where(*backend) + ": an earlier one of the group has failed";
  };

  // Only rank 0 is in a hurry. The others, if any, learn it from the window, long before their own time is up.
  if (backend->getRank() != 0) backend->setTimeout(std::chrono::minutes(10));
  std::string message;
  if (!late) message = backend_error(reduce);
  barrier(test_support::world_tp());
  if (backend->getRank() == 0) {
    expect_timed_out(message, "all_reduce of 50001", *backend, t - 1, "barrier");
  } else if (!late) {
    EXPECT_EQ(message,
              "all_reduce of 50001 elements failed " + where(*backend) + ": another rank of the group has given up");
  }
  EXPECT_EQ(backend_error(reduce), failed_before("all_reduce of 50001"));
  EXPECT_EQ(backend_error(scatter), failed_before("reduce_scatter of " + std::to_string(kLarge * t)));
  EXPECT_EQ(backend_error(reduce), failed_before("all_reduce of 50001"));
  barrier(test_support::world_tp());
}

// As above, at the group's first large reduction, when the window isn't made yet.
TEST(SharedWindow, ARankThatDoesNotComeToMakeIt) {
  const int t = runtime().size();
  if (t == 1) return;
  const auto backend = new_backend(t, {.timeout = std::chrono::milliseconds(300)});
  const bool late = backend->getRank() == t - 1;
  auto tensor = at::ones({kLarge});
  const auto reduce = [&] { all_reduce(*backend, tensor, ReduceOp::SUM); };
  if (!late) {
    expect_timed_out(backend_error(reduce), "all_reduce of 50001", *backend, std::nullopt, "barrier");
    EXPECT_EQ(backend_error(reduce), "all_reduce of 50001 elements cannot begin " + where(*backend) +
                                         ": an earlier one of the group has failed");
  }
  barrier(test_support::world_tp());
  // The message that the others began with, so that no request is open when the communicator is freed.
  auto one = at::ones({1}, at::kLong);
  auto of_ranks = at::empty({t}, at::kLong);
  if (late) backend->_allgather_base(of_ranks, one, {});
  barrier(test_support::world_tp());
}

// Rank 0 waits for messages and rank 1 in the window: whoever is in a hurry hears from the other.
TEST(SharedWindow, WhoWaitsInAnotherCollectiveIsNamed) {
  if (runtime().size() % 2 != 0) return;
  const auto backend = new_backend(2, {.timeout = std::chrono::seconds(60)});
  const bool first = backend->getRank() == 0;
  auto tensor = at::ones({kLarge});
  auto input = at::ones({6});
  auto gathered = at::empty({12});
  const auto reduce = [&] { all_reduce(*backend, tensor, ReduceOp::SUM); };
  const auto gather = [&] { backend->_allgather_base(gathered, input, {}); };
  const auto error_in_a_hurry = [&](const auto& action) {
    backend->setTimeout(std::chrono::milliseconds(300));
    auto message = backend_error(action);
    backend->setTimeout(std::chrono::seconds(60));
    return message;
  };
  reduce();
  if (first) {
    expect_timed_out(error_in_a_hurry(gather), "all_gather of 6", *backend, 1, "all_reduce");
  }
  reduce();  // what rank 1 waits in
  gather();  // on rank 1 what rank 0 began before, so that no request stays open
  if (!first) {
    expect_timed_out(error_in_a_hurry(reduce), "all_reduce of 50001", *backend, 0, "all_gather");
    gather();
  }
  barrier(test_support::world_tp());
}

}  // namespace megatron_cpp::parallel
