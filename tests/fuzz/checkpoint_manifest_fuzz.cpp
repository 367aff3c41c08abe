// The input is a checkpoint's manifest.json.
#include <vector>

#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace {

using megatron::internal::CheckpointManifest;
using megatron::internal::CheckpointTensor;

/// Every row of the tensor is in one piece, by counting.
void check_rows(const std::string& name, const CheckpointTensor& tensor) {
  constexpr int64_t kCountable = 4096;
  for (const int64_t size : tensor.shape) FUZZ_CHECK(size >= 0, name, " has a side of ", size);
  FUZZ_CHECK(!tensor.shape.empty(), name);
  if (tensor.pieces.empty()) return;
  const auto num_rows = tensor.shape.at(static_cast<size_t>(tensor.pieces.front().dim));
  if (num_rows > kCountable) return;
  std::vector<int> times(static_cast<size_t>(num_rows));
  for (const auto& piece : tensor.pieces) {
    FUZZ_CHECK(piece.dim == tensor.pieces.front().dim, name);
    for (int64_t row = piece.rows.begin; row < piece.rows.end; ++row) ++times.at(static_cast<size_t>(row));
  }
  for (const int count : times) FUZZ_CHECK(count == 1, name, ": a row is in ", count, " pieces");
}

/// The manifest of one rank that lists everything is the manifest.
void check_merged(CheckpointManifest manifest) {
  const auto merged =
      megatron::internal::merge_manifests({to_text(manifest, /*indent=*/-1)}, manifest.step, manifest.state);
  manifest.file_bytes.clear();
  FUZZ_CHECK(to_text(merged, 1) == to_text(manifest, 1));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto path = folder.write(megatron::internal::kManifestFile, fuzz::text_of(data, size));
  CheckpointManifest manifest;
  const auto reason = fuzz::refusal([&] { manifest = megatron::internal::read_manifest(folder.path()); });
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, path.string()), *reason, " names no file");
    return 0;
  }
  for (const auto& [name, tensor] : manifest.tensors) check_rows(name, tensor);
  check_merged(manifest);
  const auto missing = fuzz::refusal([&] { megatron::internal::check_files(folder.path(), manifest); });
  FUZZ_CHECK(missing.has_value() == !manifest.file_bytes.empty(), "the folder holds the manifest alone");
  if (missing) FUZZ_CHECK(fuzz::contains(*missing, folder.path().string()), *missing, " names no file");

  const auto text = to_text(manifest, /*indent=*/2);
  folder.write(megatron::internal::kManifestFile, text);
  FUZZ_CHECK(to_text(megatron::internal::read_manifest(folder.path()), 2) == text);
  return 0;
}
