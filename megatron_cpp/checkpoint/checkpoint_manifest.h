// The manifest of a checkpoint: which file holds which rows of which tensor.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "parallel/shard.h"

namespace megatron::internal {

inline constexpr const char* kManifestFile = "manifest.json";

/// Rows [rows.begin, rows.end) of dimension `dim`, stored in `file` under the tensor's name.
struct CheckpointPiece {
  std::string file;
  int64_t dim = 0;
  parallel::Range rows;
};

struct CheckpointTensor {
  std::string dtype;  ///< as c10::toString writes it
  std::vector<int64_t> shape;
  std::vector<CheckpointPiece> pieces;
};

/// What manifest.json says.
struct CheckpointManifest {
  int64_t step = 0;
  std::string state;
  std::map<std::string, int64_t> file_bytes;
  std::map<std::string, CheckpointTensor> tensors;
};

/// The manifest as JSON; `indent` spaces a level, -1 for one line.
std::string to_text(const CheckpointManifest& manifest, int indent);

/// The manifest of what each rank lists (to_text of its part), in the order of the ranks; its file_bytes are still
/// missing.
/// @throws c10::ValueError naming rank and tensor if the lists contradict each other, or leave an element of a tensor
///         out or hold it twice.
CheckpointManifest merge_manifests(const std::vector<std::string>& parts, int64_t step, const std::string& state);

/// Reads and checks the manifest in `folder`: what it returns is consistent in itself.
/// @throws c10::ValueError naming the file and the key that is missing or wrong.
CheckpointManifest read_manifest(const std::filesystem::path& folder);

/// @throws c10::ValueError naming a file of the manifest that is missing or has another size.
void check_files(const std::filesystem::path& folder, const CheckpointManifest& manifest);

/// Whether a tensor of this shape has the dimension.
bool is_dim_of(int64_t dim, const std::vector<int64_t>& shape);

}  // namespace megatron::internal
