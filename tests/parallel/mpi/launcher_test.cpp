#include "parallel/mpi/launcher.h"

#include <gtest/gtest.h>

#include <string>

namespace megatron_cpp::parallel {

namespace {

const std::string kOpenMpi = "Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4, repo rev: v4.1.4, May 26, 2022";
const std::string kMpich = "MPICH Version:\t4.0.2\nMPICH Release date:\tThu Apr  7 12:34:45 CDT 2022\n";

std::string refusal(const std::string& sign) {
  return "started as one of 2 processes (" + sign +
         "=2), but this program's MPI sees 1: start it with the mpirun of the MPI it was built with (Open MPI v4.1.4)";
}

}  // namespace

TEST(LauncherObstacle, IsSeveralProcessesOfWhichMpiSeesOne) {
  for (const std::string sign : {"PMI_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"}) {
    EXPECT_EQ(launcher_obstacle({{sign, "2"}}, 1, kOpenMpi), refusal(sign));
    EXPECT_EQ(launcher_obstacle({{sign, "2"}}, 2, kOpenMpi), "") << sign;
    EXPECT_EQ(launcher_obstacle({{sign, "1"}}, 1, kOpenMpi), "") << sign;
    EXPECT_EQ(launcher_obstacle({{sign, "two"}}, 1, kOpenMpi), "") << sign;
  }
  EXPECT_EQ(launcher_obstacle({{"SLURM_STEP_NUM_TASKS", "2"}}, 1, kOpenMpi),
            refusal("SLURM_STEP_NUM_TASKS") + ", or with srun --mpi=pmix");
  EXPECT_NE(launcher_obstacle({{"PMIX_RANK", "1"}}, 1, kOpenMpi).find("process 1 of several (PMIX_RANK=1)"),
            std::string::npos);
}

TEST(LauncherObstacle, IsNotAnAllocationNorASingleProcess) {
  EXPECT_EQ(launcher_obstacle({}, 1, kOpenMpi), "");
  EXPECT_EQ(launcher_obstacle({{"SLURM_NTASKS", "8"}, {"SLURM_PROCID", "0"}}, 1, kOpenMpi), "");
  EXPECT_EQ(launcher_obstacle({{"SLURM_STEP_NUM_TASKS", "1"}}, 1, kOpenMpi), "");
  EXPECT_EQ(launcher_obstacle({{"PMIX_RANK", "0"}}, 1, kOpenMpi), "");
  // One process of mpirun in each of a step's two tasks.
  EXPECT_EQ(launcher_obstacle({{"SLURM_STEP_NUM_TASKS", "2"}, {"OMPI_COMM_WORLD_SIZE", "1"}}, 1, kOpenMpi), "");
  // Two processes on two hosts.
  EXPECT_NE(launcher_obstacle({{"PMI_SIZE", "2"}, {"MPI_LOCALNRANKS", "1"}}, 1, kOpenMpi), "");
}

TEST(LauncherObstacle, NamesTheMpi) {
  EXPECT_NE(launcher_obstacle({{"OMPI_COMM_WORLD_SIZE", "4"}}, 1, kMpich).find("(MPICH Version: 4.0.2)"),
            std::string::npos);
}

TEST(LauncherRank, IsThatOfTheLauncherThatSaysOne) {
  EXPECT_EQ(launcher_rank({}), 0);
  for (const std::string name : {"OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID"}) {
    EXPECT_EQ(launcher_rank({{name, "3"}}), 3) << name;
  }
  EXPECT_EQ(launcher_rank({{"OMPI_COMM_WORLD_RANK", "1"}, {"SLURM_PROCID", "0"}}), 1);
}

TEST(ProcessEnvironment, HasWhatWasSet) {
  setenv("MCPP_LAUNCHER_TEST", "a=b", 1);
  EXPECT_EQ(process_environment().at("MCPP_LAUNCHER_TEST"), "a=b");
}

}  // namespace megatron_cpp::parallel
