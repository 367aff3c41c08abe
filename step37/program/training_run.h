// The pieces of a training run that its directory keeps: the model's settings, tokenizer and weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/data/sampler.h"
#include "parallel/process_groups.h"
#include "step37/data/tokenizer.h"
#include "step37/program/captioner.h"
#include "step37/program/run_config.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// Where a run keeps things.
struct RunFiles {
  std::filesystem::path directory;
  std::filesystem::path checkpoints() const { return directory / "checkpoints"; }
  std::filesystem::path metrics() const { return directory / "metrics.jsonl"; }
  std::filesystem::path report() const { return directory / "report.html"; }
  std::filesystem::path tokenizer() const { return directory / "tokenizer.model"; }
  std::filesystem::path lock() const { return directory / "lock"; }
};

/// Keeps a run's directory to one process as long as it lives: flock(2) on a file there, which the system gives back
/// whatever way the process ends.
class RunLock {
 public:
  /// A file system that has no locks gives a warning.
  /// @throws c10::ValueError naming the file if another process has it, or it can't be made.
  explicit RunLock(const std::filesystem::path& path);
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int file_;
};

/// Refuses a directory that a run couldn't be kept in: `checkpoints`, or another name here, is a link to what isn't
/// there; `checkpoints` is no folder; or what is read again, metrics and tokenizer, is there and no regular file.
/// Writes nothing.
/// @throws c10::ValueError naming the path, and where the link leads.
void check_run_files(const RunFiles& files);

/// Removes what an earlier run has left. Links stay: what they lead to is emptied or removed.
/// @throws std::filesystem::filesystem_error
void remove_earlier_run(const RunFiles& files);

/// By what a checkpoint knows its tokenizer again.
struct TokenizerMark {
  std::string hash;  ///< of the model file's bytes, hexadecimal
  int64_t vocabulary_size = 0;

  bool operator==(const TokenizerMark&) const = default;
};

/// The mark of `tokenizer`, which was loaded from `path`.
/// @throws c10::ValueError naming the file if it can't be read.
TokenizerMark mark_of(const std::filesystem::path& path, const Tokenizer& tokenizer);

/// What a checkpoint keeps beside tensors.
struct RunState {
  RunConfig config;
  SamplerState sampler;
  int64_t optimizer_steps = 0;
  std::optional<TokenizerMark> tokenizer = std::nullopt;  ///< nothing in checkpoints of versions that didn't keep it
};
std::string to_text(const RunState& state);
/// @throws c10::ValueError naming `where` and what is wrong with the text.
RunState run_state_from_text(const std::string& text, const std::string& where);

/// What the model is, as JSON, for CheckpointContents::model: the settings of the sections model and vision.
std::string model_text(const RunConfig& config);

/// Refuses settings that a run can't change once it has begun: of the sections model (but init_std) and vision all, and
/// data.vocabulary_size and training.seed. Others (steps, learning rate, batch, layout, data, ...) may change.
/// @param began  as the checkpoint `where` keeps it.
/// @throws c10::ValueError naming each key with both values.
void check_resumable(const RunConfig& began, const RunConfig& now, const std::string& where);

/// The tokenizer of the run that wrote a checkpoint, for the model in it.
/// @param checkpoint  its folder, for messages.
/// @throws c10::ValueError as Tokenizer::load; and naming both if `path` is another tokenizer than the state's.
Tokenizer load_tokenizer(const std::filesystem::path& path, const RunState& state,
                         const std::filesystem::path& checkpoint);

/// Where the tokenizer of a checkpoint lies: two folders above it, as a run leaves it. The path `given` by the user
/// comes first, since a link `checkpoints` may lead to another disk, then `folder`, the step folder with links
/// resolved. Returns where it would be if it is in neither place.
std::filesystem::path tokenizer_of_checkpoint(const std::filesystem::path& given, const std::filesystem::path& folder);

/// Sequences are padded to a multiple of lcm(64, t, 16), as the reference pads its packs.
int64_t padding_multiple(int tensor_parallel_size);

CaptionerOptions captioner_options(const RunConfig& config, const Tokenizer& tokenizer,
                                   const std::filesystem::path& folder, int tensor_parallel_size);

}  // namespace megatron_cpp::step37
