#include "megatron_cpp/training/product_rate.h"

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "megatron_cpp/tensor_parallel/matrix_product.h"
#include "parallel/collectives.h"

namespace megatron_cpp {

double product_rate(at::ScalarType dtype, const ProductShape& shape, const parallel::GroupPtr& group,
                    const c10::Device& device) {
  using Clock = std::chrono::steady_clock;
  const auto options = at::TensorOptions(dtype).device(device);
  const auto a = at::ones({shape.rows, shape.inner}, options);
  const auto b = at::ones({shape.columns, shape.inner}, options);
  const auto wait = [&] {
    if (!device.is_cpu()) c10::impl::VirtualGuardImpl(device.type()).synchronizeDevice(device.index());
  };
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < 6; ++i) {
    wait();
    parallel::barrier(group);
    const auto start = Clock::now();
    internal::linear_product(a, b, {});
    wait();
    if (i > 0) least = std::min(least, std::chrono::duration<double>(Clock::now() - start).count());
  }
  const auto slowest = at::full({1}, least, at::TensorOptions(at::kDouble).device(device));
  const double seconds = parallel::all_reduce(slowest, group, parallel::Reduction::kMax).item<double>();
  return 2.0 * static_cast<double>(shape.rows * shape.columns * shape.inner) / seconds;
}

}  // namespace megatron_cpp
