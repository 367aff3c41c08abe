// The input is a checkpoint's manifest.json.
#include <ATen/ATen.h>

#include <vector>

#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "tests/fuzz/fuzz.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

using megatron_cpp::internal::CheckpointManifest;
using megatron_cpp::internal::CheckpointTensor;

/// Every element of the tensor is in one piece, by counting.
void check_elements(const std::string& name, const CheckpointTensor& tensor) {
  constexpr double kCountable = 4096;
  double elements = 1;
  for (const int64_t size : tensor.shape) {
    FUZZ_CHECK(size >= 0, name, " has a side of ", size);
    elements *= static_cast<double>(size);
  }
  if (elements > kCountable) return;
  const auto times = at::zeros(tensor.shape, at::kInt);
  for (const auto& piece : tensor.pieces) {
    for (const auto& box : piece.part.boxes()) view_of(times, Box::whole(tensor.shape), box).add_(1);
  }
  FUZZ_CHECK(times.eq(1).all().item<bool>(), name, ": an element isn't in one piece");
}

/// The manifest of one rank that lists everything is the manifest.
void check_merged(CheckpointManifest manifest) {
  const auto merged = megatron_cpp::internal::merge_manifests({to_text(manifest, /*indent=*/-1)});
  manifest.file_bytes.clear();
  FUZZ_CHECK(to_text(merged, 1) == to_text(manifest, 1));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const test_support::TemporaryFolder folder;
  const auto path = folder.write(megatron_cpp::internal::kManifestFile, fuzz::text_of(data, size));
  CheckpointManifest manifest;
  const auto reason = fuzz::refusal([&] { manifest = megatron_cpp::internal::read_manifest(folder.path()); });
  if (reason) {
    FUZZ_CHECK(fuzz::contains(*reason, path.string()), *reason, " names no file");
    return 0;
  }
  for (const auto& [id, tensor] : manifest.tensors) check_elements(id.text(), tensor);
  check_merged(manifest);
  const auto missing = fuzz::refusal([&] { megatron_cpp::internal::check_files(folder.path(), manifest); });
  FUZZ_CHECK(missing.has_value() == !manifest.file_bytes.empty(), "the folder holds the manifest alone");
  if (missing) FUZZ_CHECK(fuzz::contains(*missing, folder.path().string()), *missing, " names no file");

  const auto text = to_text(manifest, /*indent=*/2);
  folder.write(megatron_cpp::internal::kManifestFile, text);
  FUZZ_CHECK(to_text(megatron_cpp::internal::read_manifest(folder.path()), 2) == text);
  return 0;
}

}  // namespace megatron_cpp
