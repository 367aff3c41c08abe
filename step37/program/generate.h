// `step37 generate`: captions pictures with a trained or a published model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "step37/program/sampling.h"

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// The command line of `step37 generate`.
struct GenerateArguments {
  std::filesystem::path checkpoint{};           ///< of a training run, as find_checkpoint takes it; or empty
  std::filesystem::path model{};                ///< else a published checkpoint
  std::vector<std::filesystem::path> images{};  ///< one at least
  std::string prompt{};                         ///< text with which the caption begins, see trimmed_prompt
  int64_t max_new_tokens = 64;
  SamplingOptions sampling{};
  bool cache = true;  ///< false: recompute all positions for every token
  bool ids = false;   ///< print token ids in place of text
  int expert_parallel = 1;
};

/// The prompt without surrounding blanks, as caption_from_text reads captions for training.
/// @throws c10::ValueError if there is a second line that isn't blank.
std::string trimmed_prompt(const std::string& prompt);

/// Prints one caption of all pictures on rank 0, prompt included: as one line of text, or as token ids with spaces
/// between them. All ranks are one tensor-parallel group, of any size that divides the model's sizes; experts are
/// shared out over expert_parallel of them, each over size / expert_parallel. Computes in float32.
///
/// A training run's model sees the begin token, each picture as the run's data settings cut it, and the prompt. The
/// caption ends at the run's end token, and has no picture symbols.
///
/// A published model sees each picture as the published processor writes it, without any text around it but the prompt:
/// for each crop <patch_start>, placeholders, <patch_end>, after a row of crops <patch_newline>; then <im_start>,
/// placeholders, <im_end>. Sides are those of preprocessor_config.json (size.height, patch_size, max_image_size), by
/// default the tower's image_size, crops in the released model's proportion, 504 to 728, and 3024. Ids are those of
/// config.json, else of the added_tokens of tokenizer.json. A tokenizer.model in the folder, of a training run, takes
/// the place of both: then the model sees what a training run's does. The caption ends at eos_token_id of
/// generation_config.json, else of config.json, else at the end token of tokenizer.model. Without tokenizer.model text
/// goes through the program that the environment variable STEP37_TOKENIZER of rank 0 names, such as
/// scripts/tokenize_text.py; without that, too, ids are printed, and one line on stderr says so.
/// Returns the exit status. Collective over all ranks.
/// @throws c10::ValueError or parallel::AgreedError on every rank: options out of range; a checkpoint or picture that
///         can't be read; sizes that the number of ranks doesn't divide; a symbol without an id; a prompt without
///         a tokenizer; pictures and prompt longer than the model's max_position_embeddings or the run's
///         training.sequence_length.
int generate(parallel::Runtime& runtime, const GenerateArguments& arguments);

}  // namespace megatron_cpp::step37
