// The input is a checkpoint's manifest.json.
#include <ATen/ATen.h>

#include <vector>

#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "megatron_cpp/checkpoint/checksum.h"
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
  const auto merged = megatron_cpp::internal::merge_manifests({to_text(manifest)});
  manifest.files.clear();
  FUZZ_CHECK(to_text(merged) == to_text(manifest));
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
  for (auto& [name, digest] : manifest.files) {
    if (name == megatron_cpp::internal::kManifestFile) continue;  // the folder holds that alone
    const auto missing = fuzz::refusal(
        [&, &file = name, &expected = digest] { internal::check_contents(folder.path() / file, expected); });
    FUZZ_CHECK(missing.has_value(), name, " isn't there");
    FUZZ_CHECK(fuzz::contains(*missing, folder.path().string()), *missing, " names no file");
    if (digest.checksum.empty()) digest.checksum = internal::checksum_of(name);  // of an old manifest
  }

  const auto text = file_text(manifest);
  folder.write(megatron_cpp::internal::kManifestFile, text);
  FUZZ_CHECK(file_text(megatron_cpp::internal::read_manifest(folder.path())) == text);
  return 0;
}

}  // namespace megatron_cpp
