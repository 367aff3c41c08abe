// main() of tests over Gloo: ranks come from environment variables, and MPI is never started.
#include <gtest/gtest.h>
#include <mpi.h>

#include "tests/support/test_world.h"

namespace megatron_cpp {
namespace {

class WithoutMpi : public testing::Environment {
 public:
  void TearDown() override {
    test_support::end_test_world();
    int initialized = 0;
    MPI_Initialized(&initialized);
    EXPECT_EQ(initialized, 0) << "MPI was started";
  }
};

}  // namespace
}  // namespace megatron_cpp

int main(int argc, char** argv) {
  using namespace megatron_cpp;
  testing::InitGoogleTest(&argc, argv);
  testing::AddGlobalTestEnvironment(new WithoutMpi);
  return RUN_ALL_TESTS();
}
