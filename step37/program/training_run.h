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
