#include "step37/program/full_buffer_watch.h"

#include <ATen/ATen.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <utility>
#include <vector>

namespace megatron_cpp::step37 {

struct FullBufferWatch::State {
  std::vector<int64_t> shape;
  at::ScalarType dtype = at::kFloat;
  std::map<const c10::StorageImpl*, c10::weak_intrusive_ptr<c10::StorageImpl>> alive;
  std::set<const c10::StorageImpl*> ignored;
  int64_t peak = 0;

  void see(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.has_storage() || tensor.scalar_type() != dtype || tensor.sizes() != shape) return;
    const auto& storage = tensor.storage();
    auto* const identity = storage.unsafeGetStorageImpl();
    // An expanded view of a small tensor isn't a full buffer.
    if (static_cast<int64_t>(storage.nbytes()) < bytes() || ignored.count(identity) > 0) return;
    for (auto entry = alive.begin(); entry != alive.end();) {
      entry = entry->second.expired() ? alive.erase(entry) : std::next(entry);
    }
    alive.try_emplace(identity, c10::weak_intrusive_ptr<c10::StorageImpl>(
                                    c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(identity)));
    peak = std::max(peak, static_cast<int64_t>(alive.size()) * bytes());
  }
  int64_t bytes() const {
    auto result = static_cast<int64_t>(c10::elementSize(dtype));
    for (const int64_t size : shape) result *= size;
    return result;
  }
};

namespace {

// The watch that the callbacks report to. It can't be thread-local: on a GPU, backward runs on an autograd thread,
// which inherits the callbacks of the calling thread, but not its variables.
std::mutex current_mutex;
FullBufferWatch::State* current = nullptr;

}  // namespace

FullBufferWatch::FullBufferWatch(int64_t S, int64_t B, int64_t H, at::ScalarType dtype)
    : state_(std::make_shared<State>()) {
  state_->shape = {S, B, H};
  state_->dtype = dtype;
  {
    const std::scoped_lock lock(current_mutex);
    TORCH_CHECK(current == nullptr, "another FullBufferWatch is at work in this process");
    current = state_.get();
  }
  handle_ = at::addThreadLocalCallback(
      at::RecordFunctionCallback(nullptr,
                                 [](const at::RecordFunction& function, at::ObserverContext* /*context*/) {
                                   const std::scoped_lock lock(current_mutex);
                                   if (current == nullptr) return;
                                   for (const auto& output : function.outputs()) {
                                     if (output.isTensor()) current->see(output.toTensor());
                                   }
                                 })
          .needsOutputs(true)
          .scopes({at::RecordScope::FUNCTION}));
}

FullBufferWatch::~FullBufferWatch() {
  at::removeCallback(handle_);
  const std::scoped_lock lock(current_mutex);
  current = nullptr;
}

void FullBufferWatch::ignore(const at::Tensor& tensor) {
  const std::scoped_lock lock(current_mutex);
  state_->ignored.insert(tensor.storage().unsafeGetStorageImpl());
}

int64_t FullBufferWatch::peak_bytes() const {
  const std::scoped_lock lock(current_mutex);
  return state_->peak;
}

}  // namespace megatron_cpp::step37
