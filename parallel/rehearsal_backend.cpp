#include "parallel/rehearsal_backend.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <numeric>
#include <utility>
#include <vector>

namespace parallel {
namespace {

class NothingToWaitFor final : public c10d::Work {
 public:
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds /*timeout*/) override { return true; }
  void synchronize() override {}
  void abort() override {}
};

c10::intrusive_ptr<c10d::Work> done() { return c10::make_intrusive<NothingToWaitFor>(); }

class RehearsalBackend final : public c10d::Backend {
 public:
  using c10d::Backend::Backend;

  const std::string getBackendName() const override { return "rehearsal"; }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override {
    if (options.rootRank != rank_) {
      for (auto& tensor : tensors) tensor.zero_();
    }
    return done();
  }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& /*tensors*/,
                                           const c10d::AllreduceOptions& /*options*/) override {
    return done();
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& /*options*/) override {
    for (size_t i = 0; i < inputs.size(); ++i) {
      check(static_cast<int>(outputs[i].size()) == size_, "all_gather", outputs[i].size(), " outputs");
      for (auto& output : outputs[i]) output.zero_();
      outputs[i][static_cast<size_t>(rank_)].copy_(inputs[i]);
    }
    return done();
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& /*options*/) override {
    check(output.numel() == size_ * input.numel(), "all_gather", output.sizes(), " of ", input.sizes());
    output.zero_().view({size_, -1})[rank_].copy_(input.reshape(-1));
    return done();
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                      const c10d::ReduceScatterOptions& /*options*/) override {
    check(input.numel() == size_ * output.numel(), "reduce_scatter", input.sizes(), " to ", output.sizes());
    output.view(-1).copy_(input.reshape({size_, -1})[rank_]);
    return done();
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor& output, at::Tensor& input,
                                               std::vector<int64_t>& output_split_sizes,
                                               std::vector<int64_t>& input_split_sizes,
                                               const c10d::AllToAllOptions& /*options*/) override {
    const auto [to, received] = own_part(output, output_split_sizes);
    const auto [from, kept] = own_part(input, input_split_sizes);
    check(received == kept, "all_to_all", received, " rows of its own for ", kept);
    output.zero_();
    output.narrow(0, to, received).copy_(input.narrow(0, from, kept));
    return done();
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& /*options*/) override { return done(); }

 private:
  template <class... Text>
  void check(bool ok, const char* operation, const Text&... text) const {
    TORCH_CHECK_VALUE(ok, operation, ": ", text..., " (rank ", rank_, " of ", size_, ", rehearsed)");
  }
  /// First row and rows of what this rank keeps.
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
};

}  // namespace

GroupPtr make_rehearsal_group(int rank, int size, const RehearsalOptions& options) {
  TORCH_CHECK_VALUE(rank >= 0 && rank < size, "rank ", rank, " is not one of ", size);
  TORCH_CHECK_VALUE(options.device.is_cpu() || options.device.is_cuda(), "device ", options.device,
                    " is neither the CPU nor a GPU");
  TORCH_CHECK_VALUE(options.gigabytes_per_second == 0, "collectives that take time are not built yet");
  auto group = c10::make_intrusive<c10d::ProcessGroup>(rank, size);
  group->setBackend(at::kCPU, c10d::ProcessGroup::CUSTOM, c10::make_intrusive<RehearsalBackend>(rank, size));
  if (options.device.is_cuda()) {
    // One backend type stands for one backend in a c10d group, whatever the device.
    group->setBackend(at::kCUDA, c10d::ProcessGroup::NCCL, c10::make_intrusive<RehearsalBackend>(rank, size));
  }
  return group;
}

}  // namespace parallel
