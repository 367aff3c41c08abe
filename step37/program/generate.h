// `step37 generate`: captions a picture with a trained model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace parallel {
class Runtime;
}  // namespace parallel

namespace step37 {

/// The command line of `step37 generate`.
struct GenerateArguments {
  std::filesystem::path checkpoint;  ///< a step folder of a training run, or `latest`
  std::filesystem::path image;
  std::string prompt;  ///< the caption's beginning
  int64_t max_new_tokens = 64;
};

/// Prints the caption on rank 0. All ranks are one tensor-parallel group; weights load at any number of them. Returns
/// the exit status. Collective over all ranks.
/// @throws c10::ValueError or parallel::AgreedError on every rank: a checkpoint or picture that can't be read, sizes
///         that the ranks don't divide.
int generate(parallel::Runtime& runtime, const GenerateArguments& arguments);

}  // namespace step37
