// The step37 program, started with mpirun on two ranks as a user starts it.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <stdio.h>   // popen
#include <stdlib.h>  // mkdtemp
#include <sys/wait.h>

#include <array>
#include <filesystem>
#include <string>

#include "megatron_cpp/checkpoint/safetensors.h"

namespace {

/// For the shell. (Appended piece by piece: g++ 12 warns of `"'" + string` without cause.)
std::string quoted(const std::string& path) {
  std::string result = "'";
  return result.append(path).append("'");
}

struct Outcome {
  int status = -1;     ///< the exit status, -1 if it was ended by a signal
  std::string output;  ///< stdout and stderr
};

Outcome start(const std::string& arguments) {
  auto command = quoted(MCPP_MPIEXEC);
  command.append(" " MCPP_MPIEXEC_FLAGS " ").append(quoted(MCPP_PROGRAM)).append(" ").append(arguments).append(" 2>&1");
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return {};
  Outcome outcome;
  std::array<char, 4096> buffer{};
  for (size_t bytes = 0; (bytes = fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) {
    outcome.output.append(buffer.data(), bytes);
  }
  const int status = pclose(pipe);
  if (WIFEXITED(status)) outcome.status = WEXITSTATUS(status);
  return outcome;
}

int occurrences(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

const std::filesystem::path kCase = MCPP_TEST_CASES "/embed/28_crosses_shards.safetensors";

class Program : public testing::Test {
 protected:
  void SetUp() override {
    auto name = (std::filesystem::temp_directory_path() / "program_test.XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  std::string embed(const std::filesystem::path& input) const {
    std::string command = "embed --input ";
    return command.append(quoted(input)).append(" --output ").append(quoted(folder_ / "out.safetensors"));
  }
  std::filesystem::path folder_;
};

}  // namespace

TEST_F(Program, SaysItsVersionOnce) {
  const auto outcome = start("--version");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_EQ(outcome.output, MCPP_VERSION "\n");
}

TEST_F(Program, ReplaysACase) {
  const auto outcome = start(embed(kCase) + " --sequence-parallel --projector-sharding replicated --stats " +
                             quoted(folder_ / "stats.json"));
  EXPECT_EQ(outcome.status, 0) << outcome.output;
  EXPECT_TRUE(std::filesystem::exists(folder_ / "stats.json"));
  const megatron::SafetensorsFile input(kCase);
  const megatron::SafetensorsFile output(folder_ / "out.safetensors");
  for (const char* name : {"output", "grad.word_embeddings.weight", "grad.align_projector.weight",
                           "grad.align_projector.bias", "grad.group0.image_features"}) {
    EXPECT_TRUE(at::equal(output.read(name), input.read(std::string("expected.") + name))) << name;
  }
}

TEST_F(Program, RefusesABadOptionValueOnce) {
  const auto outcome = start(embed(kCase) + " --dtype int8");
  EXPECT_GT(outcome.status, 0);
  EXPECT_EQ(occurrences(outcome.output, "--dtype int8"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: "), 1) << outcome.output;
}

TEST_F(Program, RefusesAMissingInputOnce) {
  const auto outcome = start(embed(folder_ / "none.safetensors"));
  EXPECT_GT(outcome.status, 0);
  EXPECT_EQ(occurrences(outcome.output, "none.safetensors"), 1) << outcome.output;
  EXPECT_EQ(occurrences(outcome.output, "error: "), 1) << outcome.output;
  EXPECT_FALSE(std::filesystem::exists(folder_ / "out.safetensors"));
}
