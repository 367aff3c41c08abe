#include "parallel/mpi/window_reduction.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "parallel/mpi/rank_order_reduction.h"

namespace megatron_cpp::parallel {
namespace {

using Stage = SharedWindow::Stage;

/// The elements of a tensor that one rank passes to another in one step.
struct Chunk {
  int64_t begin;   ///< first element
  int64_t length;  ///< elements; 0 behind the end of a share
};

class WindowReduction {
 public:
  /// @param share  elements that each rank reduces; the last ranks may have fewer or none.
  WindowReduction(SharedWindow& window, const at::Tensor& input, int64_t share, c10d::ReduceOp::RedOpType reduction,
                  const CollectiveCall& call)
      : window_(window),
        call_(call),
        reduction_(reduction),
        options_(at::TensorOptions().dtype(input.scalar_type())),
        input_(static_cast<const std::byte*>(input.const_data_ptr())),
        elements_(input.numel()),
        element_bytes_(input.element_size()),
        share_(share),
        chunk_(window.part_bytes() / element_bytes_),
        steps_((share + chunk_ - 1) / chunk_),
        first_(window.begin_steps(steps_, call)) {}

  // An iteration copies step n in, reduces step n - 1 and copies step n - 2 out: what it waits for was announced
  // before.
  void reduce_scatter(std::byte* output) {
    for (int64_t step = 0; step <= steps_; ++step) {
      if (step < steps_) copy_in(step);
      if (step == 0) continue;
      const Chunk own = chunk(window_.rank(), step - 1);
      reduce(step - 1, output + (own.begin - window_.rank() * share_) * element_bytes_);
      window_.announce(Stage::kDone, first_ + step - 1);
    }
  }

  void all_reduce(std::byte* output) {
    for (int64_t step = 0; step < steps_ + 2; ++step) {
      if (step < steps_) copy_in(step);
      if (step >= 1 && step <= steps_) {
        reduce(step - 1, window_.part(window_.rank(), window_.rank(), first_ + step - 1));
        window_.announce(Stage::kReduced, first_ + step - 1);
      }
      if (step >= 2) copy_out(step - 2, output);
    }
  }

 private:
  Chunk chunk(int rank, int64_t step) const {
    const int64_t begin = std::min(elements_, rank * share_ + step * chunk_);
    const int64_t end = std::min({elements_, (rank + 1) * share_, begin + chunk_});
    return {begin, std::max<int64_t>(0, end - begin)};
  }

  /// Copies this rank's values for the others into the window.
  void copy_in(int64_t step) {
    window_.wait_for_all(Stage::kDone, first_ + step - SharedWindow::kDepth, call_);
    for (int peer = 0; peer < window_.size(); ++peer) {
      if (peer == window_.rank()) continue;
      const Chunk theirs = chunk(peer, step);
      std::memcpy(window_.part(window_.rank(), peer, first_ + step), input_ + theirs.begin * element_bytes_,
                  bytes(theirs));
    }
    window_.announce(Stage::kCopiedIn, first_ + step);
  }

  /// Reduces this rank's chunk of all ranks into `target`.
  void reduce(int64_t step, std::byte* target) {
    window_.wait_for_all(Stage::kCopiedIn, first_ + step, call_);
    const Chunk own = chunk(window_.rank(), step);
    if (own.length == 0) return;
    parts_.clear();
    for (int peer = 0; peer < window_.size(); ++peer) {
      const auto* values = peer == window_.rank() ? input_ + own.begin * element_bytes_
                                                  : window_.part(peer, window_.rank(), first_ + step);
      parts_.push_back(view(values, own.length));
    }
    reduce_in_rank_order(view(target, own.length), parts_, reduction_);
  }

  /// Copies the chunks that all ranks have reduced to `output`.
  void copy_out(int64_t step, std::byte* output) {
    window_.wait_for_all(Stage::kReduced, first_ + step, call_);
    for (int peer = 0; peer < window_.size(); ++peer) {
      const Chunk theirs = chunk(peer, step);
      std::memcpy(output + theirs.begin * element_bytes_, window_.part(peer, peer, first_ + step), bytes(theirs));
    }
    window_.announce(Stage::kDone, first_ + step);
  }

  /// Only inputs of reduce_in_rank_order are made from const memory; it doesn't write to them.
  at::Tensor view(const std::byte* values, int64_t length) const {
    return at::from_blob(const_cast<std::byte*>(values), {length}, options_);
  }

  size_t bytes(const Chunk& chunk) const { return static_cast<size_t>(chunk.length * element_bytes_); }

  SharedWindow& window_;
  const CollectiveCall& call_;
  c10d::ReduceOp::RedOpType reduction_;
  at::TensorOptions options_;
  const std::byte* input_;
  int64_t elements_;
  int64_t element_bytes_;
  int64_t share_;
  int64_t chunk_;
  int64_t steps_;
  int64_t first_;
  std::vector<at::Tensor> parts_;
};

/// Gives the window up if `action` throws, so that peers neither wait for this rank nor read unfinished parts.
template <class Action>
void give_up_on_exception(SharedWindow& window, const Action& action) {
  try {
    action();
  } catch (...) {
    window.give_up();
    throw;
  }
}

}  // namespace

void reduce_scatter_in_window(SharedWindow& window, const at::Tensor& output, const at::Tensor& input,
                              c10d::ReduceOp::RedOpType reduction, const CollectiveCall& call) {
  give_up_on_exception(window, [&] {
    WindowReduction(window, input, output.numel(), reduction, call)
        .reduce_scatter(static_cast<std::byte*>(output.mutable_data_ptr()));
  });
}

void all_reduce_in_window(SharedWindow& window, const at::Tensor& output, const at::Tensor& input,
                          c10d::ReduceOp::RedOpType reduction, const CollectiveCall& call) {
  // Shares are whole cache lines, so that each begins on a cache line if the tensor does.
  const int64_t line = 64 / input.element_size();
  const int64_t per_rank = (input.numel() + window.size() - 1) / window.size();
  const int64_t share = (per_rank + line - 1) / line * line;
  give_up_on_exception(window, [&] {
    WindowReduction(window, input, share, reduction, call)
        .all_reduce(static_cast<std::byte*>(output.mutable_data_ptr()));
  });
}

}  // namespace megatron_cpp::parallel
