// `step37 pretrain`: trains Step3.7 on captioned pictures.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "step37/program/progress.h"

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// The command line of `step37 pretrain`.
struct PretrainArguments {
  std::filesystem::path config;
  std::vector<std::string> overrides;  ///< "section.key=value"
  ProgressStyle progress = ProgressStyle::kPlain;
};

/// Trains, or resumes from the latest complete checkpoint in the run directory: with the same rank layout bit for bit
/// as if it had not been interrupted. A finished run only says that it is finished. Writes metrics.jsonl, checkpoints/
/// and report.html. Returns the exit status: 0, or parallel::kInterruptedStatus if a signal asked one of the
/// ranks to stop: then all ranks have finished the step and saved a checkpoint, and there is no report yet.
/// Collective over all ranks.
/// @throws c10::ValueError or parallel::AgreedError on every rank: a configuration that doesn't fit, missing data, a
/// file
///         that can't be written; what Trainer::step throws.
int pretrain(parallel::Runtime& runtime, const PretrainArguments& arguments);

}  // namespace megatron_cpp::step37
