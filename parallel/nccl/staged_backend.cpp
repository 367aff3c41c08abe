#include "parallel/nccl/staged_backend.h"

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "parallel/finished_work.h"

namespace megatron_cpp::parallel {
namespace {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;

/// A host tensor of the shape of `tensor`, pinned for a GPU tensor.
at::Tensor host_room(const at::Tensor& tensor) {
  return at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(tensor.is_cuda()));
}

at::Tensor to_host(const at::Tensor& tensor) {
  auto host = host_room(tensor);
  host.copy_(tensor.detach());  // blocking: waits for the work queued on the current stream
  return host;
}

std::vector<at::Tensor> to_host(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> host;
  host.reserve(tensors.size());
  for (const auto& tensor : tensors) host.push_back(to_host(tensor));
  return host;
}

/// On the current stream; LibTorch reuses the pinned memory only after the copy.
void from_host(const at::Tensor& tensor, const at::Tensor& host) { tensor.detach().copy_(host, /*non_blocking=*/true); }

void from_host(const std::vector<at::Tensor>& tensors, const std::vector<at::Tensor>& host) {
  for (size_t i = 0; i < tensors.size(); ++i) from_host(tensors[i], host[i]);
}

class StagedBackend final : public c10d::Backend {
 public:
  explicit StagedBackend(c10::intrusive_ptr<c10d::Backend> host)
      : c10d::Backend(host->getRank(), host->getSize()), host_(std::move(host)) {}

  const std::string getBackendName() const override { return "staged"; }
  void setTimeout(std::chrono::milliseconds timeout) override { host_->setTimeout(timeout); }
  /// Nothing to shut down: the owner of the host backend shuts that down.
  void shutdown() override {}

  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    auto host = to_host(tensors);
    host_->broadcast(host, options)->wait();
    from_host(tensors, host);
    return finished_work(tensors);
  }
  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    auto host = to_host(tensors);
    host_->allreduce(host, options)->wait();
    from_host(tensors, host);
    return finished_work(tensors);
  }
  WorkPtr allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                    const c10d::AllgatherOptions& options) override {
    std::vector<std::vector<at::Tensor>> host(outputs.size());
    for (size_t i = 0; i < outputs.size(); ++i) {
      for (const auto& output : outputs[i]) host[i].push_back(host_room(output));
    }
    auto host_inputs = to_host(inputs);
    host_->allgather(host, host_inputs, options)->wait();
    for (size_t i = 0; i < outputs.size(); ++i) from_host(outputs[i], host[i]);
    return finished_work(outputs.empty() ? std::vector<at::Tensor>{} : outputs.front());
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto host = host_room(output);
    auto host_input = to_host(input);
    host_->_allgather_base(host, host_input, options)->wait();
    from_host(output, host);
    return finished_work({output});
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    auto host = host_room(output);
    auto host_input = to_host(input);
    host_->_reduce_scatter_base(host, host_input, options)->wait();
    from_host(output, host);
    return finished_work({output});
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override {
    auto host = host_room(output);
    auto host_input = to_host(input);
    host_->alltoall_base(host, host_input, output_splits, input_splits, options)->wait();
    from_host(output, host);
    return finished_work({output});
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return host_->barrier(options); }

 private:
  c10::intrusive_ptr<c10d::Backend> host_;
};

}  // namespace

c10::intrusive_ptr<c10d::Backend> make_staged_backend(c10::intrusive_ptr<c10d::Backend> host_backend) {
  return c10::make_intrusive<StagedBackend>(std::move(host_backend));
}

}  // namespace megatron_cpp::parallel
