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
  std::string prompt;  ///< the caption's beginning; trimmed_prompt is what the model sees
  int64_t max_new_tokens = 64;
};

/// The prompt as a caption file's text is read (caption_from_text): the model has seen no caption that begins or ends
/// with a blank.
/// @throws c10::ValueError if there is a second line that isn't blank.
std::string trimmed_prompt(const std::string& prompt);

/// Prints the caption on rank 0. All ranks are one tensor-parallel group; weights load at any number of them. Returns
/// the exit status. Collective over all ranks.
/// @throws c10::ValueError or parallel::AgreedError on every rank: a checkpoint or picture that can't be read, sizes
///         that the ranks don't divide.
int generate(parallel::Runtime& runtime, const GenerateArguments& arguments);

}  // namespace megatron_cpp::step37
