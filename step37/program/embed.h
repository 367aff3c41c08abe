// `step37 embed`: replays the image-insert embedding, forward and backward, on tensors from a file.
#pragma once

#include <filesystem>
#include <string>

#include "step37/insert/image_insert_embedding.h"

namespace megatron_cpp::parallel {
class Runtime;
}  // namespace megatron_cpp::parallel

namespace megatron_cpp::step37 {

/// The command line of `step37 embed`; members are named after the options.
struct EmbedArguments {
  std::filesystem::path input;
  std::filesystem::path output;
  std::string embedding_sharding = "vocab";
  std::string projector_sharding = "column";
  std::string exchange = "fused";
  bool sequence_parallel = false;
  bool frozen_features = false;
  bool frozen_projector = false;
  bool frozen_embedding = false;
  std::string on_mismatch = "error";
  std::string dtype = "float32";
  bool checked = checked_by_default();
  std::filesystem::path stats;  ///< empty: none
};

/// Reads the case on every rank, runs the embedding with all ranks as one tensor-parallel group, gathers the results
/// and writes them on rank 0. Returns the exit status. Collective over all ranks.
/// @throws on every rank: c10::ValueError for options that can't be combined, sizes that t doesn't divide and counts
///         that don't match; parallel::AgreedError for a file that can't be read or written, and for tensors in it that
///         are missing or don't fit.
int embed(parallel::Runtime& runtime, const EmbedArguments& arguments);

}  // namespace megatron_cpp::step37
