#include "tests/support/faulty_group.h"

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "parallel/c10d_calls.h"
#include "parallel/finished_work.h"

namespace megatron_cpp::test_support {
namespace {

using parallel::CollectiveKind;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

class FaultyBackend final : public c10d::Backend {
 public:
  FaultyBackend(c10::intrusive_ptr<c10d::Backend> inner, CollectiveFault fault)
      : c10d::Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)), fault_(std::move(fault)) {}

  const std::string getBackendName() const override { return inner_->getBackendName(); }

  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    return inner_->broadcast(tensors, options);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return inner_->barrier(options); }
  WorkPtr allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                    const c10d::AllgatherOptions& options) override {
    return inner_->allgather(outputs, inputs, options);
  }
  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    const auto given = sent(CollectiveKind::kAllReduce, tensors[0]);
    tensors[0].copy_(given);
    inner_->allreduce(tensors, options)->wait();
    return received(CollectiveKind::kAllReduce, tensors[0], given);
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto given = sent(CollectiveKind::kAllGather, input);
    inner_->_allgather_base(output, given, options)->wait();
    return received(CollectiveKind::kAllGather, output, given);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    auto given = sent(CollectiveKind::kReduceScatter, input);
    inner_->_reduce_scatter_base(output, given, options)->wait();
    return received(CollectiveKind::kReduceScatter, output, given);
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override {
    auto given = sent(CollectiveKind::kAllToAll, input);
    inner_->alltoall_base(output, given, output_splits, input_splits, options)->wait();
    return received(CollectiveKind::kAllToAll, output, given);
  }

 private:
  at::Tensor sent(CollectiveKind kind, const at::Tensor& input) const {
    auto given = input.clone();
    if (fault_.sent) fault_.sent(kind, given);
    return given;
  }
  WorkPtr received(CollectiveKind kind, at::Tensor& output, const at::Tensor& given) const {
    if (fault_.received) fault_.received(kind, output, given);
    return parallel::finished_work({output});
  }

  c10::intrusive_ptr<c10d::Backend> inner_;
  CollectiveFault fault_;
};

}  // namespace

parallel::GroupPtr with_fault(const parallel::GroupPtr& group, CollectiveFault fault) {
  auto faulty = c10::make_intrusive<c10d::ProcessGroup>(group->getRank(), group->getSize());
  faulty->setBackend(c10::DeviceType::CPU, c10d::ProcessGroup::CUSTOM,
                     c10::make_intrusive<FaultyBackend>(group->getBackend(c10::DeviceType::CPU), std::move(fault)));
  faulty->setGroupName(group->getGroupName());
  return faulty;
}

}  // namespace megatron_cpp::test_support
