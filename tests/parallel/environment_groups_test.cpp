// Groups from environment variables, in one process: what is wrong with the variables, and what isn't there.
#include "parallel/environment_groups.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <map>
#include <string>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "parallel/collectives.h"
#include "tests/support/errors.h"

namespace megatron_cpp::parallel {
namespace {

using namespace test_support;

c10::intrusive_ptr<c10d::TCPStore> serve() {
  return c10::make_intrusive<c10d::TCPStore>("127.0.0.1",
                                             c10d::TCPStoreOptions{.port = 0, .isServer = true, .waitWorkers = false});
}

/// Sets the variables of a launcher for one test: those of `changes` on top of rank 0 of 1 at a free port. An empty
/// value unsets one.
class EnvironmentGroups : public testing::Test {
 protected:
  void TearDown() override { set({}); }

  static void set(const std::map<std::string, std::string>& variables) {
    for (const char* name : {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID",
                             "SLURM_LOCALID", "SLURM_NTASKS", "TORCHELASTIC_USE_AGENT_STORE"}) {
      const auto found = variables.find(name);
      if (found == variables.end() || found->second.empty()) {
        unsetenv(name);
      } else {
        setenv(name, found->second.c_str(), 1);
      }
    }
  }

  static void set_changed(std::map<std::string, std::string> changes) {
    changes.merge(std::map<std::string, std::string>{{"RANK", "0"},
                                                     {"WORLD_SIZE", "1"},
                                                     {"MASTER_ADDR", "127.0.0.1"},
                                                     {"MASTER_PORT", std::to_string(serve()->getPort())}});
    set(changes);
  }

  static ProcessGroups make(const RankGrid& grid = {}, int timeout_s = 60) {
    return process_groups_from_environment(grid, {.timeout = std::chrono::seconds(timeout_s)});
  }
};

}  // namespace

TEST_F(EnvironmentGroups, AreLookedForInTorchrunsAndSlurmsVariables) {
  set({});
  EXPECT_FALSE(ranks_in_environment());
  set({{"RANK", "0"}, {"MASTER_ADDR", "127.0.0.1"}});
  EXPECT_FALSE(ranks_in_environment());
  set({{"RANK", "0"}, {"WORLD_SIZE", "3"}});
  EXPECT_TRUE(ranks_in_environment());
  EXPECT_EQ(world_size_in_environment(), 3);
  set({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "5"}});
  EXPECT_FALSE(ranks_in_environment());
  set({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "5"}, {"MASTER_ADDR", "127.0.0.1"}});
  EXPECT_TRUE(ranks_in_environment());
  EXPECT_EQ(world_size_in_environment(), 5);
  set({{"WORLD_SIZE", "3"}, {"SLURM_NTASKS", "5"}});
  EXPECT_EQ(world_size_in_environment(), 3);
}

TEST_F(EnvironmentGroups, OfOneRankAreMadeTwice) {
  for (const bool slurm : {false, true}) {
    set_changed(slurm ? std::map<std::string, std::string>{{"RANK", ""},
                                                           {"WORLD_SIZE", ""},
                                                           {"SLURM_PROCID", "0"},
                                                           {"SLURM_NTASKS", "1"}}
                      : std::map<std::string, std::string>{});
    const auto first = make();
    const auto second = make();
    for (const auto& groups : {first, second}) {
      EXPECT_EQ(groups.dp->getGroupName(), "dp");
      for (const auto& [name, dims, group] : kGroupKinds) {
        EXPECT_EQ((groups.*group)->getSize(), 1);
        barrier(groups.*group);
      }
    }
  }
}

TEST_F(EnvironmentGroups, FindTheStoreThatTorchrunServes) {
  const auto store = serve();
  set_changed({{"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"MASTER_PORT", std::to_string(store->getPort())}});
  EXPECT_EQ(make().world->getSize(), 1);
}

TEST_F(EnvironmentGroups, NameTheVariableThatIsMissing) {
  set_changed({{"RANK", ""}});
  EXPECT_EQ(value_error([] { make(); }), "RANK is not set: torchrun sets it, or srun SLURM_PROCID");
  set_changed({{"WORLD_SIZE", ""}});
  EXPECT_EQ(value_error([] { make(); }), "WORLD_SIZE is not set: torchrun sets it, or srun SLURM_NTASKS");
  set_changed({{"MASTER_ADDR", ""}});
  EXPECT_EQ(value_error([] { make(); }), "MASTER_ADDR is not set: torchrun sets it");
  set_changed({{"MASTER_PORT", ""}});
  EXPECT_EQ(value_error([] { make(); }), "MASTER_PORT is not set: torchrun sets it");
}

TEST_F(EnvironmentGroups, NameTheVariableThatIsNoNumberInRange) {
  for (const char* rank : {"two", "-1", "1", "0x0", "0 ", "99999999999"}) {
    set_changed({{"RANK", rank}});
    EXPECT_EQ(value_error([] { make(); }), "RANK='" + std::string(rank) + "' is no whole number from 0 to 0");
  }
  set_changed({{"WORLD_SIZE", "0"}});
  EXPECT_EQ(value_error([] { make(); }), "WORLD_SIZE='0' is no whole number from 1 to 2147483647");
  set_changed({{"RANK", ""}, {"SLURM_PROCID", "3"}});
  EXPECT_EQ(value_error([] { make(); }), "SLURM_PROCID='3' is no whole number from 0 to 0");
  for (const char* port : {"0", "65536", "http"}) {
    set_changed({{"MASTER_PORT", port}});
    EXPECT_EQ(value_error([] { make(); }),
              "MASTER_PORT='" + std::string(port) + "' is no whole number from 1 to 65535");
  }
}

TEST_F(EnvironmentGroups, RefuseAGridOfAnotherSize) {
  set_changed({});
  EXPECT_TRUE(contains(value_error([] { make({.tp = 2}); }), "does not make the 1 ranks that were started"));
}

TEST_F(EnvironmentGroups, NameTheAddressWhereNobodyAnswers) {
  set_changed({{"RANK", "1"}, {"WORLD_SIZE", "2"}});
  EXPECT_TRUE(contains(error_of<c10::DistBackendError>([] { make({.tp = 2}, 1); }),
                       "rank 1 of 2 can't reach rank 0 at 127.0.0.1:" + std::string(std::getenv("MASTER_PORT")) +
                           " (MASTER_ADDR, MASTER_PORT): "));
  set_changed({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"MASTER_ADDR", "nowhere.invalid"}});
  EXPECT_TRUE(contains(error_of<c10::DistBackendError>([] { make({.tp = 2}, 1); }), "rank 0 at nowhere.invalid:"));
}

TEST_F(EnvironmentGroups, SayThatTheOthersDoNotCome) {
  set_changed({{"WORLD_SIZE", "2"}});
  EXPECT_TRUE(
      contains(error_of<c10::DistBackendError>([] { make({.tp = 2}, 1); }), "rank 0 of 2 can't gather the others at "));
}

TEST_F(EnvironmentGroups, NameTheAddressThatIsTaken) {
  const auto other = serve();
  set_changed({{"MASTER_PORT", std::to_string(other->getPort())}});
  EXPECT_TRUE(contains(error_of<c10::DistBackendError>([] { make(); }),
                       "127.0.0.1:" + std::to_string(other->getPort()) + " (MASTER_ADDR, MASTER_PORT): "));
}

TEST_F(EnvironmentGroups, RefuseAGpuThatIsNotThere) {
  if (at::detail::getCUDAHooks().deviceCount() > 0) GTEST_SKIP() << "there is one";
  set_changed({});
  EXPECT_TRUE(contains(error_of<AgreedError>([] { process_groups_from_environment({}, {}, c10::Device(c10::kCUDA)); }),
                       "no GPU is visible"));
}

}  // namespace megatron_cpp::parallel
