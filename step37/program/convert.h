// Turns checkpoints of one layout into the other.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "parallel/group.h"
#include "step37/published_checkpoint.h"

namespace megatron_cpp::parallel {
class Runtime;
}

namespace megatron_cpp::step37 {

/// The options of `step37 convert`.
struct ConvertArguments {
  std::filesystem::path from = {};    ///< a published checkpoint, a run directory, its checkpoints, or one of these
  std::filesystem::path to = {};      ///< must not exist, or be empty
  std::filesystem::path config = {};  ///< of a training result: the configuration that it is to go on with, or empty
  std::string layout = {};            ///< published or training; empty: the other one than `from` has
  std::string dtype = {};             ///< of a published result: float32 or bfloat16; empty: as config.json says
  int64_t max_shard_size = WritePublishedOptions{}.max_shard_size;  ///< bytes of a file of a published result
};

/// Converts on any number of ranks. A published checkpoint becomes a run directory: its tokenizer files, and
/// checkpoints/step-00000000 with the parameters in float32 and, in the manifest, config.json. A training checkpoint
/// becomes a published one in the dtypes that it came from, or in float32 if the model was made here. Values are
/// copied: there and back is bit for bit, but for the bits of a NaN. The moments of a training checkpoint stay
/// behind. Those of a published folder come along, if it has optimizer.safetensors (OptimizerFile): the result is then
/// that of the step that is given there. A rank reads and writes its share of the tensors and holds no more than one of
/// them at a time, or, for a training result, its share of all.
/// @return  the exit status, 0.
/// @throws c10::ValueError or parallel::AgreedError on every rank, naming what is wrong. Collective over all ranks.
int convert(parallel::Runtime& runtime, const ConvertArguments& arguments);

/// Writes the parameters of a training checkpoint as a published one.
/// @param from  a run directory, its checkpoints, or one of these.
/// @param options  its files are set here. Collective over `world`; throws as convert().
void export_checkpoint(const std::filesystem::path& from, const std::filesystem::path& to,
                       const parallel::GroupPtr& world, WritePublishedOptions options = {});

}  // namespace megatron_cpp::step37
