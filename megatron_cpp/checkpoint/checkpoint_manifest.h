// The manifest of a checkpoint: which file holds which part of which tensor.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/file_digest.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/parameters/box.h"

namespace megatron_cpp::internal {

inline constexpr const char* kManifestFile = "manifest.json";

/// A part of a tensor and where it is stored.
struct CheckpointPiece {
  std::string file;
  std::string key;  ///< the name of the stored tensor in the file
  TensorPart part;
};

struct CheckpointTensor {
  std::string dtype;  ///< as safetensors writes it: "F32"
  std::vector<int64_t> shape;
  std::vector<CheckpointPiece> pieces;
};

/// What manifest.json says.
struct CheckpointManifest {
  int64_t step = 0;
  std::string state;
  std::string model;                        ///< JSON, or empty
  std::string tokenizer;                    ///< hash, or empty
  CheckpointConfiguration configuration;    ///< empty before format version 3
  std::string library_version;              ///< of the library that saved; empty before format version 3
  std::map<std::string, FileDigest> files;  ///< without checksums before format version 3
  std::map<TensorId, CheckpointTensor> tensors;
};

/// The name of a role in manifests: "exp_avg".
std::string role_text(TensorRole role);

/// @throws c10::ValueError naming a tensor whose part isn't in it, or isn't of the shape of `local`.
void check_part(const ShardedTensor& tensor);

/// The name under which a part of a tensor is stored; no tool can take it for the name of a whole tensor.
std::string stored_name(const TensorId& id, const TensorPart& part);

/// Metadata of a checkpoint file: for each stored tensor a JSON text with name, role, dtype and shape of the whole
/// tensor and the part that is stored.
std::map<std::string, std::string> file_metadata(const CheckpointManifest& manifest);

/// The manifest as JSON in one line, as ranks send it.
std::string to_text(const CheckpointManifest& manifest);

/// The manifest as it is written: JSON whose last line holds the checksum of all before it.
std::string file_text(const CheckpointManifest& manifest);

/// A JSON object, indented by 1, with that line in place of the end.
std::string with_checksum(std::string json);

/// Merges the manifests of the ranks (to_text of each), in the order of the ranks. files stays empty; state, model,
/// tokenizer, configuration and library_version are those of rank 0.
/// @throws c10::ValueError naming rank or tensor if the manifests contradict each other, or an element of a tensor is
///         missing or there twice.
CheckpointManifest merge_manifests(const std::vector<std::string>& parts);

/// Reads and checks the manifest in `folder`, of format version 1, 2 or 3. The result is consistent.
/// @throws c10::ValueError naming the file and what is wrong: both checksums, a newer version of the format and of the
///         library that wrote it, or the key that is missing or wrong.
CheckpointManifest read_manifest(const std::filesystem::path& folder);

/// @throws c10::ValueError naming the file if it is missing or has another size.
void check_size(const std::filesystem::path& file, int64_t expected);

/// Reads the file and compares it; without a checksum check_size alone.
/// @throws c10::ValueError naming the file if it is missing or can't be read, and both sizes and checksums if they
///         differ.
void check_contents(const std::filesystem::path& file, const FileDigest& expected);

}  // namespace megatron_cpp::internal
