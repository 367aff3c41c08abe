// The pieces of a training run that its directory keeps: the model's settings, tokenizer and weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/data/sampler.h"
#include "parallel/process_groups.h"
#include "step37/data/tokenizer.h"
#include "step37/program/captioner.h"
#include "step37/program/run_config.h"
#include "step37/step37_model.h"

namespace step37 {

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

/// What a checkpoint keeps beside tensors.
struct RunState {
  RunConfig config;
  megatron::SamplerState sampler;
  int64_t optimizer_steps = 0;
};
std::string to_text(const RunState& state);
/// @throws c10::ValueError naming `where` and what is wrong with the text.
RunState run_state_from_text(const std::string& text, const std::string& where);

/// Sequences are padded to a multiple of lcm(64, t, 16), as the reference pads its packs.
int64_t padding_multiple(int tensor_parallel_size);

CaptionerOptions captioner_options(const RunConfig& config, const Tokenizer& tokenizer,
                                   const std::filesystem::path& folder, int tensor_parallel_size);

}  // namespace step37
