// `step37 generate`: captions a picture with a trained model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// The command line of `step37 generate`.
struct GenerateArguments {
  std::filesystem::path checkpoint;  ///< of a training run, as find_checkpoint takes it
  std::filesystem::path image;
  std::string prompt;  ///< text with which the caption begins; the model gets trimmed_prompt(prompt)
  int64_t max_new_tokens = 64;
};

/// The prompt without surrounding blanks, as caption_from_text reads captions for training.
/// @throws c10::ValueError if there is a second line that isn't blank.
std::string trimmed_prompt(const std::string& prompt);

/// Prints the caption on rank 0. All ranks are one tensor-parallel group, of any size that divides the model's sizes.
/// Returns the exit status. Collective over all ranks.
/// @throws c10::ValueError or parallel::AgreedError on every rank: a checkpoint or picture that can't be read, sizes
///         that the number of ranks doesn't divide.
int generate(parallel::Runtime& runtime, const GenerateArguments& arguments);

}  // namespace megatron_cpp::step37
