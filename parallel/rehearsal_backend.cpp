#include "parallel/rehearsal_backend.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "parallel/finished_work.h"
#include "parallel/paced_stream.h"

namespace megatron_cpp::parallel {
namespace {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;

int64_t bytes(const at::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }

class RehearsalBackend final : public c10d::Backend {
 public:
  RehearsalBackend(int rank, int size, std::shared_ptr<PacedStream> stream)
      : c10d::Backend(rank, size), stream_(std::move(stream)) {}

  const std::string getBackendName() const override { return "rehearsal"; }
  void setTimeout(std::chrono::milliseconds /*timeout*/) override {}

  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    const bool is_root = options.rootRank == rank_;
    return run(options.asyncOp, tensors, is_root ? 0 : total(tensors), shared(total(tensors)), [=] {
      if (is_root) return;
      for (const auto& tensor : tensors) tensor.zero_();
    });
  }
  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    return run(options.asyncOp, tensors, 0, 2 * shared(total(tensors)), [] {});
  }
  WorkPtr allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                    const c10d::AllgatherOptions& options) override {
    auto tensors = inputs;
    int64_t filled = 0;
    for (size_t i = 0; i < inputs.size(); ++i) {
      check(static_cast<int>(outputs[i].size()) == size_, "all_gather", outputs[i].size(), " outputs");
      filled += total(outputs[i]);
      tensors.insert(tensors.end(), outputs[i].begin(), outputs[i].end());
    }
    return run(options.asyncOp, std::move(tensors), filled, (size_ - 1) * total(inputs), [=, rank = rank_] {
      for (size_t i = 0; i < inputs.size(); ++i) {
        for (const auto& output : outputs[i]) output.zero_();
        outputs[i][static_cast<size_t>(rank)].copy_(inputs[i]);
      }
    });
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    check(output.numel() == size_ * input.numel(), "all_gather", output.sizes(), " of ", input.sizes());
    return run(options.asyncOp, {output, input}, bytes(output), shared(bytes(output)), [=, rank = rank_, size = size_] {
      const auto shares = output.view({size, -1});
      shares[rank].copy_(input.reshape(-1));  // which may lie there
      shares.narrow(0, 0, rank).zero_();
      shares.narrow(0, rank + 1, size - rank - 1).zero_();
    });
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    check(input.numel() == size_ * output.numel(), "reduce_scatter", input.sizes(), " to ", output.sizes());
    return run(options.asyncOp, {output, input}, bytes(output), shared(bytes(input)), [=, rank = rank_, size = size_] {
      output.view(-1).copy_(input.reshape({size, -1})[rank]);
    });
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_split_sizes,
                        std::vector<int64_t>& input_split_sizes, const c10d::AllToAllOptions& options) override {
    const auto [to, received] = own_part(output, output_split_sizes);
    const auto [from, kept] = own_part(input, input_split_sizes);
    check(received == kept, "all_to_all", received, " rows of its own for ", kept);
    const int64_t rows = input.size(0);
    const int64_t sent = rows == 0 ? 0 : bytes(input) / rows * (rows - kept);
    const auto own = input.narrow(0, from, kept);
    const auto own_output = output.narrow(0, to, received);
    return run(options.asyncOp, {output, input}, bytes(output), sent, [=] {
      output.zero_();
      own_output.copy_(own);
    });
  }
  WorkPtr barrier(const c10d::BarrierOptions& /*options*/) override { return finished_work({}); }

 private:
  template <class... Text>
  void check(bool ok, const char* operation, const Text&... text) const {
    TORCH_CHECK_VALUE(ok, operation, ": ", text..., " (rank ", rank_, " of ", size_, ", rehearsed)");
  }
  static int64_t total(const std::vector<at::Tensor>& tensors) {
    return std::accumulate(tensors.begin(), tensors.end(), int64_t{0},
                           [](int64_t sum, const at::Tensor& tensor) { return sum + bytes(tensor); });
  }
  /// (t-1)/t of `whole`.
  int64_t shared(int64_t whole) const { return whole * (size_ - 1) / size_; }
  /// First row and number of rows of the part that this rank keeps.
  std::pair<int64_t, int64_t> own_part(const at::Tensor& tensor, const std::vector<int64_t>& splits) const {
    if (splits.empty()) {
      check(tensor.size(0) % size_ == 0, "all_to_all", tensor.size(0), " rows");
      return {tensor.size(0) / size_ * rank_, tensor.size(0) / size_};
    }
    check(static_cast<int>(splits.size()) == size_ &&
              std::accumulate(splits.begin(), splits.end(), int64_t{0}) == tensor.size(0),
          "all_to_all", splits.size(), " splits of ", tensor.size(0), " rows");
    return {std::accumulate(splits.begin(), splits.begin() + rank_, int64_t{0}), splits[static_cast<size_t>(rank_)]};
  }
  /// As in NCCL, without asyncOp the current stream waits for the collective, and there is no Work.
  WorkPtr run(bool is_async, std::vector<at::Tensor> tensors, int64_t filled_bytes, int64_t sent_bytes,
              const std::function<void()>& fill) {
    if (!stream_) {
      fill();
      return finished_work(std::move(tensors));
    }
    auto work = stream_->run(fill, filled_bytes, sent_bytes, std::move(tensors));
    if (is_async) return work;
    work->wait();
    return {};
  }

  std::shared_ptr<PacedStream> stream_;
};

}  // namespace

PacedTransfer paced_transfer(int64_t sent_bytes, int64_t filled_bytes, double gigabytes_per_second,
                             double copied_gigabytes_per_second) {
  const double wanted = 1e-9 * static_cast<double>(sent_bytes) / gigabytes_per_second;
  const double moving = 1e-9 * static_cast<double>(std::max(sent_bytes, filled_bytes)) / copied_gigabytes_per_second;
  return {.copied_bytes = std::max<int64_t>(0, sent_bytes - filled_bytes),
          .idle_seconds = std::max(0.0, wanted - moving)};
}

c10::intrusive_ptr<c10d::Backend> make_rehearsal_backend(int rank, int size, std::shared_ptr<PacedStream> stream) {
  return c10::make_intrusive<RehearsalBackend>(rank, size, std::move(stream));
}

GroupPtr make_rehearsal_group(int rank, int size, const RehearsalOptions& options) {
  TORCH_CHECK_VALUE(rank >= 0 && rank < size, "rank ", rank, " is not one of ", size);
  TORCH_CHECK_VALUE(options.device.is_cpu() || options.device.is_cuda(), "device ", options.device,
                    " is neither the CPU nor a GPU");
  TORCH_CHECK_VALUE(
      options.gigabytes_per_second >= 0 && (options.gigabytes_per_second == 0 || options.device.is_cuda()),
      options.gigabytes_per_second, " GB/s: collectives take a time of their own on GPUs only");
  auto group = c10::make_intrusive<c10d::ProcessGroup>(rank, size);
  group->setBackend(at::kCPU, c10d::ProcessGroup::CUSTOM, make_rehearsal_backend(rank, size, nullptr));
  if (options.device.is_cuda()) {
    auto stream = options.gigabytes_per_second > 0 ? make_paced_stream(options.device, options.gigabytes_per_second)
                                                   : std::shared_ptr<PacedStream>{};
    // A c10d group has one backend per backend type.
    group->setBackend(at::kCUDA, c10d::ProcessGroup::NCCL, make_rehearsal_backend(rank, size, std::move(stream)));
  }
  return group;
}

}  // namespace megatron_cpp::parallel
