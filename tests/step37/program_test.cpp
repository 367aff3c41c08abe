// The step37 program, started with mpirun on two ranks as a user starts it.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "tests/support/command.h"
#include "tests/support/environment.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

using namespace test_support;

Outcome start(const std::string& arguments) {
  return test_support::run_command(test_support::mpiexec(2) + " " + quoted(test_support::setting("MCPP_PROGRAM")) +
                                   " " + arguments);
}

const std::filesystem::path kCase = test_support::cases() / "embed/28_crosses_shards.safetensors";

class Program : public testing::Test {
 protected:
  std::string embed(const std::filesystem::path& input) const {
    std::string command = "embed --input ";
    return command.append(quoted(input)).append(" --output ").append(quoted(folder_.path() / "out.safetensors"));
  }
  /// Training in `folder_`, with a configuration of the project and one more setting.
  std::string pretrain(const std::string& setting) const {
    return quoted(test_support::setting("MCPP_PROGRAM"))
        .append(" pretrain --config ")
        .append(quoted(test_support::cases() / "../../configs/tuxpaint.yaml"))
        .append(" run.directory=")
        .append(quoted(folder_.path() / "run"))
        .append(" ")
        .append(setting);
  }
  /// Starts two ranks with two commands. (Not with mpirun's own ":", at which Open MPI 5.0's crashes.)
  test_support::Outcome start_two(const std::string& first, const std::string& second) const {
    const auto script = folder_.write("by_rank.sh", "if [ ${OMPI_COMM_WORLD_RANK:-$PMI_RANK} = 0 ]; then exec " +
                                                        first + "; else exec " + second + "; fi\n");
    return test_support::run_command(test_support::mpiexec(2) + " sh " + quoted(script));
  }
  test_support::TemporaryFolder folder_;
};

}  // namespace

TEST_F(Program, SaysItsVersionOnce) {
  const auto outcome = start("--version");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.output, MCPP_VERSION "\n");
}

TEST_F(Program, ReplaysACase) {
  const auto outcome = start(embed(kCase) + " --sequence-parallel --projector-sharding replicated --stats " +
                             quoted(folder_.path() / "stats.json"));
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  EXPECT_TRUE(std::filesystem::exists(folder_.path() / "stats.json"));
  const SafetensorsFile input(kCase);
  const SafetensorsFile output(folder_.path() / "out.safetensors");
  for (const char* name : {"output", "grad.word_embeddings.weight", "grad.align_projector.weight",
                           "grad.align_projector.bias", "grad.group0.image_features"}) {
    EXPECT_TRUE(at::equal(output.read(name), input.read(std::string("expected.") + name))) << name;
  }
}

TEST_F(Program, PlansWithoutMpirunOrData) {
  const auto plan = [&](const std::string& arguments) {
    return test_support::run_command(quoted(test_support::setting("MCPP_PROGRAM")) + " plan --config " +
                                     quoted(test_support::cases() / "../../configs/step37_flash.yaml") + " " +
                                     arguments);
  };
  const auto last_line = [](const std::string& output) {
    const auto end = output.find_last_not_of('\n') + 1;
    return nlohmann::json::parse(output.substr(output.rfind('\n', end - 1) + 1, end));
  };
  const auto own = plan("data.directory=/none");
  EXPECT_EQ(own.status, 0) << own.output;
  const auto json = last_line(own.output);
  EXPECT_EQ(json["ranks"], 64);
  EXPECT_TRUE(json["fits"].is_null());
  int64_t bytes = 0;
  for (const char* part : {"weights", "gradients", "optimizer", "activations", "buffers"}) {
    bytes += json["memory_bytes"][part].get<int64_t>();
  }
  EXPECT_EQ(json["memory_bytes"]["total"], bytes);
  EXPECT_GT(json["bytes_per_step"]["all_to_all"], 0);
  EXPECT_FALSE(json["bytes_per_step"].contains("broadcast"));

  const auto none = plan("--gpus 64 --memory 80");
  EXPECT_EQ(none.status, 0) << none.output;
  EXPECT_EQ(none.output.find("no layout fits: "), 0U) << none.output;
  EXPECT_EQ(last_line(none.output)["fits"], false);
  const auto best = plan("--gpus 64 --memory 1000 --images-per-pack 2");
  EXPECT_EQ(best.output.find("the best layouts of 64 GPUs"), 0U) << best.output;
  EXPECT_EQ(last_line(best.output)["fits"], true);

  const auto wrong = plan("tp=7 dp=8 ep=1 etp=1");
  EXPECT_EQ(wrong.status, 1);
  EXPECT_NE(wrong.output.find("hidden_size 4096 is not divisible by tensor-parallel size 7"), std::string::npos)
      << wrong.output;
}

TEST_F(Program, RefusesABadOptionValueOnce) {
  const auto outcome = start(embed(kCase) + " --dtype int8");
  EXPECT_GT(outcome.status, 0);
  EXPECT_EQ(occurrences(outcome.output, "--dtype int8"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: "), 1) << outcome.output;
}

TEST_F(Program, RefusesAMissingInputOnce) {
  const auto outcome = start(embed(folder_.path() / "none.safetensors"));
  EXPECT_GT(outcome.status, 0);
  EXPECT_EQ(occurrences(outcome.output, "none.safetensors"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: "), 1) << outcome.output;
  EXPECT_FALSE(std::filesystem::exists(folder_.path() / "out.safetensors"));
}

TEST_F(Program, TellsWhichSettingDiffersBetweenRanks) {
  const auto outcome = start_two(pretrain("training.seed=1"), pretrain("training.seed=2"));
  EXPECT_GT(outcome.status, 0);
  EXPECT_EQ(occurrences(outcome.output,
                        "error: ranks disagree: training.seed is '1' on rank 0 and '2' elsewhere (rank 1 of 2)"),
            1)
      << outcome.output;
}

TEST_F(Program, TellsWhenRanksAreLaidOutDifferently) {
  const auto outcome = start_two(pretrain("parallel.tp=1"), pretrain("parallel.tp=2"));
  EXPECT_GT(outcome.status, 0);
  EXPECT_EQ(occurrences(outcome.output, "error: ranks disagree: the layout of the ranks is 'tp 1, "), 1)
      << outcome.output;
}

}  // namespace megatron_cpp::step37
