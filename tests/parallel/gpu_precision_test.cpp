// What GPUs are told about their products; the settings are there without a GPU.
#include "parallel/gpu_precision.h"

#include <ATen/Context.h>
#include <gtest/gtest.h>

namespace {

TEST(GpuPrecision, IsThatOfTheTensors) {
  auto& context = at::globalContext();
  context.setAllowTF32CuDNN(true);
  context.setAllowTF32CuBLAS(true);
  parallel::multiply_exactly_on_gpus();
  EXPECT_FALSE(context.allowTF32CuDNN());
  // What LibTorch's convolution asks.
  EXPECT_FALSE(context.allowTF32CuDNN(at::Float32Op::CONV));
  EXPECT_FALSE(context.allowTF32CuBLAS());
  constexpr auto kInFloat32 = at::CuBLASReductionOption::DisallowReducedPrecisionAllowSplitK;
  EXPECT_EQ(context.allowFP16ReductionCuBLAS(), kInFloat32);
  EXPECT_EQ(context.allowBF16ReductionCuBLAS(), kInFloat32);
}

}  // namespace
