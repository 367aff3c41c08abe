// Records which LibTorch operators run, and the tensors that they return.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

namespace megatron_cpp::test_support {

/// Records operators while it lives: on the thread that created it, and on the autograd threads of its backward passes
/// on a GPU, which inherit the callbacks of the thread. One object at a time in a process.
class OperatorWatch {
 public:
  OperatorWatch() {
    {
      const std::scoped_lock lock(mutex_);
      TORCH_INTERNAL_ASSERT(current_ == nullptr, "there is another OperatorWatch");
      current_ = this;
    }
    handle_ = at::addThreadLocalCallback(at::RecordFunctionCallback(begin_operator, end_operator)
                                             .needsInputs(true)
                                             .needsOutputs(true)
                                             .scopes({at::RecordScope::FUNCTION}));
  }
  ~OperatorWatch() {
    at::removeCallback(handle_);
    const std::scoped_lock lock(mutex_);
    current_ = nullptr;
  }
  OperatorWatch(const OperatorWatch&) = delete;
  OperatorWatch& operator=(const OperatorWatch&) = delete;

  /// How often each operator ran, including calls inside other operators.
  std::map<std::string, int64_t> counts() const {
    const std::scoped_lock lock(mutex_);
    return counts_;
  }
  int64_t count(const std::string& name) const {
    const std::scoped_lock lock(mutex_);
    const auto found = counts_.find(name);
    return found == counts_.end() ? 0 : found->second;
  }
#ifdef NDEBUG
  static constexpr bool kSeesCopies = true;
#else
  /// In debug builds RecordFunction::inputs() reads a member that LibTorch's release library doesn't have.
  static constexpr bool kSeesCopies = false;
#endif
  /// Copies from the CPU to another device; 0 unless kSeesCopies.
  int64_t copies_from_host() const {
    const std::scoped_lock lock(mutex_);
    return copies_from_host_;
  }
  /// Copies from another device to the CPU; 0 unless kSeesCopies.
  int64_t copies_to_host() const {
    const std::scoped_lock lock(mutex_);
    return copies_to_host_;
  }
  /// Number of new int64 tensors, such as index lists.
  int64_t new_lists() const {
    const std::scoped_lock lock(mutex_);
    return new_lists_;
  }
  /// Size of the largest storage of a floating-point tensor that an operator returned; views count with their storage.
  int64_t largest_bytes() const {
    const std::scoped_lock lock(mutex_);
    return largest_bytes_;
  }

 private:
  // Callbacks are plain functions, and find the watch in current_.
  static std::unique_ptr<at::ObserverContext> begin_operator(const at::RecordFunction& function) {
    const std::scoped_lock lock(mutex_);
    if (current_ == nullptr) return nullptr;
    ++current_->counts_[function.name()];
    if (!kSeesCopies || function.name() != std::string("aten::copy_")) return nullptr;
    const bool to_host = function.inputs()[0].toTensor().is_cpu();
    const bool from_host = function.inputs()[1].toTensor().is_cpu();
    if (from_host && !to_host) ++current_->copies_from_host_;
    if (to_host && !from_host) ++current_->copies_to_host_;
    return nullptr;
  }
  static void end_operator(const at::RecordFunction& function, at::ObserverContext* /*context*/) {
    const std::scoped_lock lock(mutex_);
    if (current_ == nullptr) return;
    for (const auto& output : function.outputs()) {
      if (!output.isTensor()) continue;
      const auto& tensor = output.toTensor();
      if (tensor.defined() && tensor.scalar_type() == at::kLong && function.name() == std::string("aten::empty")) {
        ++current_->new_lists_;
      }
      if (!tensor.defined() || !tensor.has_storage() || !tensor.is_floating_point()) continue;
      current_->largest_bytes_ = std::max(current_->largest_bytes_, static_cast<int64_t>(tensor.storage().nbytes()));
    }
  }

  inline static std::mutex mutex_;
  inline static OperatorWatch* current_ = nullptr;
  at::CallbackHandle handle_ = 0;
  std::map<std::string, int64_t> counts_;
  int64_t copies_from_host_ = 0;
  int64_t copies_to_host_ = 0;
  int64_t new_lists_ = 0;
  int64_t largest_bytes_ = 0;
};

}  // namespace megatron_cpp::test_support
