#include "tests/support/nccl_like_backend.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace megatron_cpp::test_support {
namespace {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;

/// A queue of collectives that run late, like a CUDA stream.
class LateCollectives {
 public:
  int64_t add(std::function<void()> collective) {
    waiting_.push_back(std::move(collective));
    return next_++;
  }
  bool is_done(int64_t number) const { return number < next_ - static_cast<int64_t>(waiting_.size()); }
  void finish(int64_t number) {
    while (!is_done(number)) {
      const auto collective = std::move(waiting_.front());
      waiting_.pop_front();
      collective();
    }
  }
  void finish_all() { finish(next_ - 1); }

 private:
  std::deque<std::function<void()>> waiting_;
  int64_t next_ = 0;
};

class LateWork final : public c10d::Work {
 public:
  LateWork(std::shared_ptr<LateCollectives> collectives, int64_t number)
      : collectives_(std::move(collectives)), number_(number) {}
  ~LateWork() override {
    if (!is_waited_for_) ADD_FAILURE() << "nobody has waited for a collective";
  }
  LateWork(const LateWork&) = delete;
  LateWork& operator=(const LateWork&) = delete;

  bool isCompleted() override { return collectives_->is_done(number_); }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds /*timeout*/) override {
    is_waited_for_ = true;
    collectives_->finish(number_);
    return true;
  }
  void synchronize() override { wait(kNoTimeout); }
  void abort() override {}

 private:
  std::shared_ptr<LateCollectives> collectives_;
  int64_t number_;
  bool is_waited_for_ = false;
};

void check(const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.defined() && !tensor.is_sparse(), "Tensors must be CUDA and dense");
  TORCH_CHECK_VALUE(tensor.is_contiguous(), "Tensors must be contiguous");
}

const at::Tensor& single(const std::vector<at::Tensor>& tensors) {
  TORCH_CHECK_VALUE(tensors.size() == 1, "Expecting one tensor only but got ", tensors.size());
  check(tensors.front());
  return tensors.front();
}

/// Fills the output of a collective that hasn't run yet with garbage.
void spoil(const at::Tensor& output) {
  if (at::isFloatingType(output.scalar_type())) {
    output.detach().fill_(std::numeric_limits<double>::quiet_NaN());
  } else {
    output.detach().fill_(85);
  }
}

class NcclLikeBackend final : public c10d::Backend {
 public:
  explicit NcclLikeBackend(c10::intrusive_ptr<c10d::Backend> inner)
      : c10d::Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)) {}

  const std::string getBackendName() const override { return "nccl"; }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }

  WorkPtr broadcast(std::vector<at::Tensor>& tensors, const c10d::BroadcastOptions& options) override {
    single(tensors);
    return issue(options.asyncOp, {}, [=, this]() mutable { inner_->broadcast(tensors, options)->wait(); });
  }
  WorkPtr allreduce(std::vector<at::Tensor>& tensors, const c10d::AllreduceOptions& options) override {
    single(tensors);
    return issue(options.asyncOp, {}, [=, this]() mutable { inner_->allreduce(tensors, options)->wait(); });
  }
  WorkPtr allgather(std::vector<std::vector<at::Tensor>>& outputs, std::vector<at::Tensor>& inputs,
                    const c10d::AllgatherOptions& options) override {
    const auto& input = single(inputs);
    TORCH_CHECK_VALUE(outputs.size() == 1 && static_cast<int>(outputs[0].size()) == size_,
                      "Tensor list input to allgather must match number of ranks");
    for (const auto& output : outputs[0]) {
      check(output);
      TORCH_CHECK_VALUE(output.scalar_type() == input.scalar_type(), "Invalid usage of tensors with different dtypes");
    }
    return issue(options.asyncOp, outputs[0],
                 [=, this]() mutable { inner_->allgather(outputs, inputs, options)->wait(); });
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    check_pair(output, input);
    TORCH_CHECK_VALUE(input.numel() * size_ == output.numel(),
                      "output tensor size must be equal to world_size times input tensor size");
    std::vector<at::Tensor> outputs{output};
    if (output.is_alias_of(input)) {
      outputs = output.view({size_, -1}).unbind(0);
      TORCH_CHECK_VALUE(outputs[static_cast<size_t>(rank_)].const_data_ptr() == input.const_data_ptr(),
                        "an all-gather in place needs the input where its share of the output belongs");
      outputs.erase(outputs.begin() + rank_);
    }
    return issue(options.asyncOp, outputs,
                 [=, this]() mutable { inner_->_allgather_base(output, input, options)->wait(); });
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    check_pair(output, input);
    TORCH_CHECK_VALUE(input.numel() == output.numel() * size_,
                      "input tensor must be the same size as output size times world size");
    std::vector<at::Tensor> outputs;
    if (!output.is_alias_of(input)) {
      outputs.push_back(output);
    } else {
      TORCH_CHECK_VALUE(input.view({size_, -1})[rank_].const_data_ptr() == output.const_data_ptr(),
                        "a reduce-scatter in place needs the output where its share of the input is");
    }
    return issue(options.asyncOp, outputs,
                 [=, this]() mutable { inner_->_reduce_scatter_base(output, input, options)->wait(); });
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_splits,
                        std::vector<int64_t>& input_splits, const c10d::AllToAllOptions& options) override {
    check_pair(output, input);
    check_splits(output, output_splits);
    check_splits(input, input_splits);
    return issue(options.asyncOp, {output}, [=, this]() mutable {
      inner_->alltoall_base(output, input, output_splits, input_splits, options)->wait();
    });
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override {
    return issue(options.asyncOp, {}, [=, this] { inner_->barrier(options)->wait(); });
  }

 private:
  static void check_pair(const at::Tensor& output, const at::Tensor& input) {
    check(output);
    check(input);
    TORCH_CHECK_VALUE(input.scalar_type() == output.scalar_type(), "input must have the same type as output");
  }
  void check_splits(const at::Tensor& tensor, const std::vector<int64_t>& splits) const {
    if (splits.empty()) {
      TORCH_CHECK_VALUE(tensor.size(0) % size_ == 0, "Tensor's dim 0 does not divide equally across group size");
    } else {
      TORCH_CHECK_VALUE(static_cast<int>(splits.size()) == size_, "Number of tensor splits not equal to group size");
      TORCH_CHECK_VALUE(std::accumulate(splits.begin(), splits.end(), int64_t{0}) == tensor.size(0),
                        "Split sizes doesn't match total dim 0 size");
    }
  }
  /// @param outputs  the tensors that the collective only writes to.
  WorkPtr issue(bool is_async, const std::vector<at::Tensor>& outputs, std::function<void()> collective) {
    for (const auto& output : outputs) spoil(output);
    const auto number = collectives_->add(std::move(collective));
    if (is_async) return c10::make_intrusive<LateWork>(collectives_, number);
    collectives_->finish_all();
    return {};
  }

  c10::intrusive_ptr<c10d::Backend> inner_;
  std::shared_ptr<LateCollectives> collectives_ = std::make_shared<LateCollectives>();
};

}  // namespace

parallel::GroupPtr like_nccl(const parallel::GroupPtr& group) {
  auto result = c10::make_intrusive<c10d::ProcessGroup>(group->getRank(), group->getSize());
  result->setBackend(at::kCPU, c10d::ProcessGroup::CUSTOM,
                     c10::make_intrusive<NcclLikeBackend>(group->getBackend(at::kCPU)));
  result->setGroupName(group->getGroupName());
  return result;
}

}  // namespace megatron_cpp::test_support
