#include "tests/support/command.h"

#include <gtest/gtest.h>
#include <stdio.h>  // popen
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>

#include "tests/support/environment.h"

namespace megatron_cpp::test_support {
namespace {

/// Number of processes with `mark` in their command line.
int processes_with(const std::string& mark) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
    const auto name = entry.path().filename().string();
    if (!std::all_of(name.begin(), name.end(), [](unsigned char letter) { return std::isdigit(letter) != 0; }))
      continue;
    std::ifstream file(entry.path() / "cmdline", std::ios::binary);
    const std::string arguments(std::istreambuf_iterator<char>(file), {});
    if (arguments.find(mark) != std::string::npos) ++count;
  }
  return count;
}

}  // namespace

// (Appended piece by piece: g++ 12 warns about `"'" + string` without reason.)
std::string quoted(const std::string& path) {
  std::string result = "'";
  return result.append(path).append("'");
}

Outcome run_command(const std::string& command) {
  FILE* pipe = popen((command + " 2>&1").c_str(), "r");
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

std::string mpiexec(int ranks) { return setting("MCPP_MPIEXEC") + " " + std::to_string(ranks); }

void expect_no_process_left(const std::string& mark) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(5);
  while (processes_with(mark) > 0 && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  EXPECT_EQ(processes_with(mark), 0);
}

int occurrences(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++count;
  return count;
}

}  // namespace megatron_cpp::test_support
