#include "parallel/gpu_precision.h"

#include <ATen/Context.h>

namespace parallel {

void multiply_exactly_on_gpus() {
  auto& context = at::globalContext();
  context.setAllowTF32CuDNN(false);
  context.setAllowTF32CuBLAS(false);  // off by default, but some containers switch it on by their environment
  context.setAllowFP16ReductionCuBLAS(false);
  context.setAllowBF16ReductionCuBLAS(false);
}

}  // namespace parallel
