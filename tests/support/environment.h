// What a test is told about where things are, by its environment: paths in a unit would make ccache miss in every
// clone.
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

/// The golden cases: the folder MCPP_TEST_CASES, and tests/cases for whoever starts a test in the clone's root.
inline std::filesystem::path cases() {
  const char* value = std::getenv("MCPP_TEST_CASES");
  return value == nullptr ? "tests/cases" : value;
}

}  // namespace megatron_cpp::test_support
