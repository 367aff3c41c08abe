#include "step37/program/sampling.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace megatron_cpp::step37 {

void SamplingOptions::validate() const {
  TORCH_CHECK_VALUE(std::isfinite(temperature) && temperature >= 0.0, "--temperature ", temperature,
                    ": expected 0 or more");
  TORCH_CHECK_VALUE(top_p > 0.0 && top_p <= 1.0, "--top-p ", top_p, ": expected above 0 and at most 1");
}

int64_t choose_token(const at::Tensor& logits, const SamplingOptions& options, std::mt19937_64& random) {
  if (options.temperature == 0.0) return logits.argmax().item<int64_t>();
  const auto wide = logits.to(at::kCPU, at::kDouble);
  // Less the maximum before the division, so that a tiny temperature gives no infinities.
  const auto probabilities = at::softmax((wide - wide.max()) / options.temperature, 0);
  const auto [sorted, ids] = probabilities.sort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  const auto sums = sorted.cumsum(0);
  const auto* begin = sums.const_data_ptr<double>();
  const auto* last = std::lower_bound(begin, begin + sums.numel() - 1, options.top_p);  // of the nucleus
  // The generator's numbers are the same on every platform; those of std::uniform_real_distribution are not.
  const double draw = std::ldexp(static_cast<double>(random() >> 11), -53) * *last;
  return ids.const_data_ptr<int64_t>()[std::upper_bound(begin, last, draw) - begin];
}

}  // namespace megatron_cpp::step37
