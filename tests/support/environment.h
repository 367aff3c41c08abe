// Paths that tests get from environment variables: compiled-in paths would make ccache miss in every clone.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <string>

namespace megatron_cpp::test_support {

/// The environment variable `name`, which tests/CMakeLists.txt sets for the tests that need it.
/// @throws std::runtime_error if it isn't set.
inline std::string setting(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  if (value == nullptr) throw std::runtime_error(name + " isn't set: start the test with ctest");
  return value;
}

/// The folder of golden cases: MCPP_TEST_CASES, or tests/cases if a test is started by hand in the root of the clone.
inline std::filesystem::path cases() {
  const char* value = std::getenv("MCPP_TEST_CASES");
  return value == nullptr ? "tests/cases" : value;
}

}  // namespace megatron_cpp::test_support
