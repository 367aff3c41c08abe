#include <ATen/ATen.h>
#include <ATen/cuda/Sleep.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "parallel/paced_stream.h"

namespace megatron_cpp::parallel {
namespace {

constexpr int64_t kScratchBytes = 1 << 26;

/// Complete when the work queued on its stream so far is done.
class EventWork final : public c10d::Work {
 public:
  EventWork(const c10::cuda::CUDAStream& stream, std::vector<at::Tensor> tensors)
      : device_(stream.device_index()), event_(c10::DeviceType::CUDA), tensors_(std::move(tensors)) {
    event_.record(stream.unwrap());
  }
  bool isCompleted() override { return event_.query(); }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds /*timeout*/) override {
    synchronize();
    return true;
  }
  void synchronize() override { event_.block(c10::cuda::getCurrentCUDAStream(device_).unwrap()); }
  void abort() override {}
  std::vector<at::Tensor> result() override { return tensors_; }

 private:
  c10::DeviceIndex device_;
  c10::Event event_;
  std::vector<at::Tensor> tensors_;
};

class CudaPacedStream final : public PacedStream {
 public:
  CudaPacedStream(c10::Device device, double gigabytes_per_second)
      : gigabytes_per_second_(gigabytes_per_second),
        stream_(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index())) {
    const c10::cuda::CUDAStreamGuard guard(stream_);
    const auto bytes = at::TensorOptions().device(stream_.device()).dtype(at::kByte);
    source_ = at::zeros({kScratchBytes}, bytes);
    target_ = at::empty({kScratchBytes}, bytes);
    constexpr int kCopies = 16;
    constexpr int64_t kCycles = 10'000'000;
    copy(kCopies * kScratchBytes);  // warm-up
    copied_gigabytes_per_second_ = 1e-9 * kCopies * kScratchBytes / seconds_of([&] { copy(kCopies * kScratchBytes); });
    cycles_per_second_ = static_cast<double>(kCycles) / seconds_of([&] { at::cuda::sleep(kCycles); });
  }

  c10::intrusive_ptr<c10d::Work> run(const std::function<void()>& fill, int64_t filled_bytes, int64_t sent_bytes,
                                     std::vector<at::Tensor> tensors) override {
    c10::Event given(c10::DeviceType::CUDA);
    given.record(c10::cuda::getCurrentCUDAStream(stream_.device_index()).unwrap());
    const c10::cuda::CUDAStreamGuard guard(stream_);
    given.block(stream_.unwrap());
    fill();
    const auto transfer = paced_transfer(sent_bytes, filled_bytes, gigabytes_per_second_, copied_gigabytes_per_second_);
    copy(transfer.copied_bytes);
    const auto cycles = static_cast<int64_t>(transfer.idle_seconds * cycles_per_second_);
    if (cycles > 0) at::cuda::sleep(cycles);
    return c10::make_intrusive<EventWork>(stream_, std::move(tensors));
  }

 private:
  void copy(int64_t bytes) {
    for (; bytes > 0; bytes -= kScratchBytes) {
      const int64_t length = std::min(bytes, kScratchBytes);
      target_.narrow(0, 0, length).copy_(source_.narrow(0, 0, length), /*non_blocking=*/true);
    }
  }

  double seconds_of(const std::function<void()>& action) const {
    c10::Event begin(c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
    c10::Event end(c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
    begin.record(stream_.unwrap());
    action();
    end.record(stream_.unwrap());
    end.synchronize();
    return 1e-3 * begin.elapsedTime(end);
  }

  double gigabytes_per_second_;
  c10::cuda::CUDAStream stream_;
  at::Tensor source_;  // allocated on stream_, like target_, so that their memory is reused only after its copies
  at::Tensor target_;
  double copied_gigabytes_per_second_ = 0;
  double cycles_per_second_ = 0;
};

}  // namespace

std::shared_ptr<PacedStream> make_paced_stream(c10::Device device, double gigabytes_per_second) {
  return std::make_shared<CudaPacedStream>(device, gigabytes_per_second);
}

}  // namespace megatron_cpp::parallel
