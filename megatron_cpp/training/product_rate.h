// How fast this machine multiplies matrices: what the speed of a step is compared with.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "parallel/group.h"

namespace megatron_cpp {

/// Sizes of a product [rows, inner] x [columns, inner]^T.
struct ProductShape {
  int64_t rows = 0;     ///< of the result
  int64_t columns = 0;  ///< of the result
  int64_t inner = 0;    ///< that are summed over
};

/// Floating-point operations a second of one rank in a matrix product, an addition and a multiplication counted as two:
/// the best of five, after one that isn't counted, while all ranks of `group` compute, as ranks that share cores slow
/// each other down; of the slowest rank. Collective over `group`; waits for the device.
double product_rate(at::ScalarType dtype, const ProductShape& shape, const parallel::GroupPtr& group,
                    const c10::Device& device);

}  // namespace megatron_cpp
