#include "parallel/recording_backend.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <map>
#include <numeric>
#include <utility>
#include <vector>

namespace megatron_cpp::parallel {
namespace {

/// Calls the observer, then passes the call on to another backend.
class ObservedBackend final : public c10d::Backend {
 public:
  ObservedBackend(c10::intrusive_ptr<c10d::Backend> inner, std::shared_ptr<const CollectiveObserver> observer)
      : c10d::Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)), observer_(std::move(observer)) {}

  const std::string getBackendName() const override { return inner_->getBackendName(); }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }

  c10::intrusive_ptr<c10d::Work> broadcast(std::vector<at::Tensor>& tensors,
                                           const c10d::BroadcastOptions& options) override {
    for (const auto& tensor : tensors) (*observer_)(CollectiveKind::kBroadcast, shared(tensor));
    return inner_->broadcast(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<at::Tensor>& tensors,
                                           const c10d::AllreduceOptions& options) override {
    for (const auto& tensor : tensors) (*observer_)(CollectiveKind::kAllReduce, 2 * shared(tensor));
    return inner_->allreduce(tensors, options);
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<at::Tensor>>& outputs,
                                           std::vector<at::Tensor>& inputs,
                                           const c10d::AllgatherOptions& options) override {
    for (const auto& input : inputs) (*observer_)(CollectiveKind::kAllGather, (size_ - 1) * bytes(input));
    return inner_->allgather(outputs, inputs, options);
  }
  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input,
                                                 const c10d::AllgatherOptions& options) override {
    (*observer_)(CollectiveKind::kAllGather, shared(output));
    return inner_->_allgather_base(output, input, options);
  }
  c10::intrusive_ptr<c10d::Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                                      const c10d::ReduceScatterOptions& options) override {
    (*observer_)(CollectiveKind::kReduceScatter, shared(input));
    return inner_->_reduce_scatter_base(output, input, options);
  }
  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor& output, at::Tensor& input,
                                               std::vector<int64_t>& output_split_sizes,
                                               std::vector<int64_t>& input_split_sizes,
                                               const c10d::AllToAllOptions& options) override {
    int64_t sent = shared(input);
    if (!input_split_sizes.empty()) {
      const int64_t rows = std::accumulate(input_split_sizes.begin(), input_split_sizes.end(), int64_t{0});
      const int64_t kept = input_split_sizes[static_cast<size_t>(rank_)];
      sent = rows == 0 ? 0 : bytes(input) / rows * (rows - kept);
    }
    (*observer_)(CollectiveKind::kAllToAll, sent);
    return inner_->alltoall_base(output, input, output_split_sizes, input_split_sizes, options);
  }
  c10::intrusive_ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override {
    return inner_->barrier(options);
  }

 private:
  static int64_t bytes(const at::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); }
  /// (t-1)/t of the tensor's bytes.
  int64_t shared(const at::Tensor& tensor) const { return bytes(tensor) * (size_ - 1) / size_; }

  c10::intrusive_ptr<c10d::Backend> inner_;
  std::shared_ptr<const CollectiveObserver> observer_;
};

}  // namespace

std::string_view collective_name(CollectiveKind kind) {
  constexpr std::array<std::string_view, kNumCollectiveKinds> kNames = {"all_reduce", "all_gather", "reduce_scatter",
                                                                        "all_to_all", "broadcast"};
  return kNames[static_cast<size_t>(kind)];
}

int64_t CommunicationCount::total() const {
  return std::accumulate(collectives.begin(), collectives.end(), int64_t{0});
}

CommunicationCount CommunicationCount::operator-(const CommunicationCount& earlier) const {
  CommunicationCount difference;
  for (size_t kind = 0; kind < collectives.size(); ++kind) {
    difference.collectives[kind] = collectives[kind] - earlier.collectives[kind];
  }
  difference.bytes_sent = bytes_sent - earlier.bytes_sent;
  return difference;
}

GroupPtr observe(const GroupPtr& group, CollectiveObserver observer) {
  const auto shared_observer = std::make_shared<const CollectiveObserver>(std::move(observer));
  auto observed = c10::make_intrusive<c10d::ProcessGroup>(group->getRank(), group->getSize());
  for (const auto& device : group->getDeviceTypes()) {
    // A c10d group has one backend per backend type, so the two devices need different types.
    const auto type = device.is_cpu() ? c10d::ProcessGroup::CUSTOM : c10d::ProcessGroup::NCCL;
    observed->setBackend(device.type(), type,
                         c10::make_intrusive<ObservedBackend>(group->getBackend(device.type()), shared_observer));
  }
  observed->setGroupName(group->getGroupName());
  return observed;
}

ProcessGroups observe(const ProcessGroups& groups, const CollectiveObserver& observer) {
  auto observed = groups;
  std::map<GroupPtr, GroupPtr> replacements{{groups.world, groups.world}};
  for (const auto& kind : kGroupKinds) {
    auto& group = observed.*(kind.group);
    if (!group) continue;
    auto& replacement = replacements[group];
    if (!replacement) replacement = observe(group, observer);
    group = replacement;
  }
  return observed;
}

RecordedGroup record(const GroupPtr& group) {
  auto count = std::make_shared<CommunicationCount>();
  auto recorded = observe(group, [count](CollectiveKind kind, int64_t bytes_sent) {
    ++count->collectives[static_cast<size_t>(kind)];
    count->bytes_sent += bytes_sent;
  });
  return {std::move(recorded), std::move(count)};
}

}  // namespace megatron_cpp::parallel
