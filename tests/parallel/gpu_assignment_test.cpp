#include "parallel/gpu_assignment.h"

#include <gtest/gtest.h>

#include <array>

using parallel::gpu_obstacle;

TEST(GpuObstacle, NamesTheRankWithoutAGpu) {
  EXPECT_EQ(gpu_obstacle(std::array<uint64_t, 3>{7, 8, 9}, false), "");
  EXPECT_EQ(gpu_obstacle(std::array<uint64_t, 3>{7, 0, 9}, false), "rank 1 sees no GPU");
  EXPECT_EQ(gpu_obstacle(std::array<uint64_t, 1>{0}, true), "rank 0 sees no GPU");
}

TEST(GpuObstacle, NamesTheRanksThatWouldShareOneUnlessTheyMay) {
  const std::array<uint64_t, 4> gpus{7, 8, 9, 8};
  EXPECT_EQ(gpu_obstacle(gpus, false),
            "ranks 1 and 3 would share a GPU: start at most one rank per GPU, or allow sharing");
  EXPECT_EQ(gpu_obstacle(gpus, true), "");
}
