#include "parallel/gpu.h"

#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "tests/support/errors.h"

namespace megatron_cpp::parallel {

using namespace test_support;

namespace {

using Gpus = std::vector<uint64_t>;

/// Every way in which up to three ranks can see none, one or another of two GPUs.
std::vector<Gpus> all_sights() {
  std::vector<Gpus> sights;
  for (size_t ranks = 1; ranks <= 3; ++ranks) {
    for (int code = 0; code < (ranks == 1 ? 3 : ranks == 2 ? 9 : 27); ++code) {
      Gpus gpus;
      for (int rest = code; gpus.size() < ranks; rest /= 3) gpus.push_back(static_cast<uint64_t>(rest % 3));
      sights.push_back(gpus);
    }
  }
  return sights;
}

std::string error(const DeviceOptions& options, const Gpus& gpus, bool has_nccl = true) {
  return value_error([&] { choose_device_of_all(options, gpus, has_nccl); });
}

}  // namespace

TEST(DeviceChoice, OfEveryOptionAndSight) {
  for (const auto& gpus : all_sights()) {
    const std::multiset<uint64_t> seen(gpus.begin(), gpus.end());
    const bool none = seen.count(0) == gpus.size();
    const bool all = seen.count(0) == 0;
    const bool shared = seen.count(1) > 1 || seen.count(2) > 1;
    for (const std::string device : {"auto", "cpu", "cuda"}) {
      for (const bool share : {false, true}) {
        for (const bool may_leave : {false, true}) {
          const DeviceOptions options{.device = device, .share_devices = share, .may_leave_gpus = may_leave};
          const bool can = all && (share || !shared);
          const auto told = c10::str(device, " ", share, may_leave, " ",
                                     at::IntArrayRef(std::vector<int64_t>(gpus.begin(), gpus.end())));
          if (device == "cpu" || (device == "auto" && none)) {
            const auto choice = choose_device_of_all(options, gpus, true);
            EXPECT_FALSE(choice.on_gpus || choice.shares_gpus) << told;
            EXPECT_EQ(choice.warning, "") << told;
          } else if (can) {
            const auto choice = choose_device_of_all(options, gpus, true);
            EXPECT_TRUE(choice.on_gpus) << told;
            EXPECT_EQ(choice.shares_gpus, shared) << told;
            EXPECT_EQ(choice.warning, "") << told;
          } else if (device == "auto" && may_leave) {
            const auto choice = choose_device_of_all(options, gpus, true);
            EXPECT_FALSE(choice.on_gpus || choice.shares_gpus) << told;
            EXPECT_TRUE(contains(choice.warning, "all ranks compute on the CPU: rank")) << told;
          } else {
            EXPECT_TRUE(contains(error(options, gpus), none  ? "no rank sees a GPU"
                                                       : all ? "would share"
                                                             : "sees no GPU"))
                << told;
          }
        }
      }
    }
  }
}

TEST(DeviceChoice, WithoutNcclIsTheCpuUnlessGpusAreAskedFor) {
  EXPECT_FALSE(choose_device_of_all({.device = "auto"}, Gpus{0, 0}, false).on_gpus);
  EXPECT_FALSE(choose_device_of_all({.device = "cpu"}, Gpus{0, 0}, false).on_gpus);
  EXPECT_EQ(error({.device = "cuda"}, {0, 0}, false), "device cuda was asked for, but this build has no NCCL");
}

TEST(DeviceChoice, SaysWhichRanksAndWhatToDo) {
  EXPECT_EQ(
      error({.device = "auto"}, {7, 8, 9, 8}),
      "ranks 1 and 3 would share a GPU: start at most one rank per GPU, let ranks share GPUs (share_gpus=true), or "
      "compute on the CPU (device=cpu)");
  EXPECT_EQ(error({.device = "cuda"}, {7, 0, 9}),
            "device cuda was asked for, but rank 1 sees no GPU while others do: give each rank one, or compute on the "
            "CPU (device=cpu)");
  EXPECT_EQ(error({.device = "cuda"}, {0}),
            "device cuda was asked for, but no rank sees a GPU (nvidia-smi and CUDA_VISIBLE_DEVICES tell)");
  EXPECT_EQ(error({.device = "tpu"}, {0}), "device 'tpu' is not one of auto, cpu, cuda");
}

// What GPUs are told about their products; the settings are there without a GPU.
TEST(GpuPrecision, IsThatOfTheTensors) {
  auto& context = at::globalContext();
  context.setAllowTF32CuDNN(true);
  context.setAllowTF32CuBLAS(true);
  multiply_exactly_on_gpus();
  EXPECT_FALSE(context.allowTF32CuDNN());
  // What LibTorch's convolution asks.
  EXPECT_FALSE(context.allowTF32CuDNN(at::Float32Op::CONV));
  EXPECT_FALSE(context.allowTF32CuBLAS());
  constexpr auto kInFloat32 = at::CuBLASReductionOption::DisallowReducedPrecisionAllowSplitK;
  EXPECT_EQ(context.allowFP16ReductionCuBLAS(), kInFloat32);
  EXPECT_EQ(context.allowBF16ReductionCuBLAS(), kInFloat32);
}

}  // namespace megatron_cpp::parallel
