#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cstring>
#include <map>
#include <utility>

#include "megatron_cpp/checkpoint/checkpoint_folder.h"
#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;
using internal::CheckpointManifest;
using internal::CheckpointTensor;
using internal::kManifestFile;
using internal::partial_of;

std::string rank_file(int rank, int num_ranks) {
  return fmt::format("rank-{:04}-of-{:04}.safetensors", rank, num_ranks);
}

/// The text of every rank, on every rank. Collective: two all-gathers.
std::vector<std::string> gather_texts(const std::string& text, const parallel::GroupPtr& group) {
  const auto lengths = parallel::all_gather(at::full({1}, static_cast<int64_t>(text.size()), at::kLong), group);
  const auto longest = lengths.max().item<int64_t>();
  auto letters = at::zeros({1, longest}, at::kByte);
  std::memcpy(letters.mutable_data_ptr(), text.data(), text.size());
  letters = parallel::all_gather(letters, group);
  std::vector<std::string> texts;
  for (int64_t rank = 0; rank < lengths.numel(); ++rank) {
    const auto* begin = static_cast<const char*>(letters.const_data_ptr()) + rank * longest;
    texts.emplace_back(begin, static_cast<size_t>(lengths[rank].item<int64_t>()));
  }
  return texts;
}

bool is_written(const ShardedTensor& tensor) { return tensor.main_replica && tensor.part.numel() > 0; }

/// This rank's part of the manifest. Also lists tensors that it doesn't write, so that a tensor that no rank writes is
/// noticed.
CheckpointManifest manifest_part(const CheckpointContents& contents, const std::string& file) {
  TORCH_CHECK_VALUE(contents.step >= 0, "checkpoint of step ", contents.step);
  CheckpointManifest part{.step = contents.step,
                          .state = contents.state,
                          .model = contents.model,
                          .tokenizer = contents.tokenizer,
                          .configuration = contents.configuration,
                          .library_version = MCPP_VERSION,
                          .files = {},
                          .tensors = {}};
  for (const auto& tensor : contents.tensors) {
    internal::check_part(tensor);
    const auto dtype = safetensors_dtype(tensor.local.scalar_type(), tensor.id.text());
    auto& entry = part.tensors.try_emplace(tensor.id, CheckpointTensor{dtype, tensor.global_shape, {}}).first->second;
    TORCH_CHECK_VALUE(entry.dtype == dtype && entry.shape == tensor.global_shape, "parts of tensor ", tensor.id.text(),
                      " are of ", entry.dtype, " ", at::IntArrayRef(entry.shape), " and of ", dtype, " ",
                      at::IntArrayRef(tensor.global_shape));
    if (is_written(tensor)) {
      entry.pieces.push_back({file, internal::stored_name(tensor.id, tensor.part), tensor.part});
    }
  }
  return part;
}

/// Returns what was written: nothing if this rank writes no tensor.
FileDigest write_own_file(const fs::path& file, const std::vector<ShardedTensor>& tensors,
                          const CheckpointManifest& part) {
  std::vector<NamedTensor> parts;
  for (const auto& tensor : tensors) {
    if (is_written(tensor)) parts.push_back({internal::stored_name(tensor.id, tensor.part), tensor.local});
  }
  return parts.empty() ? FileDigest{} : write_safetensors(file, parts, internal::file_metadata(part));
}

/// The files that the ranks have written. Collective: three all-gathers.
std::map<std::string, FileDigest> gather_digests(const FileDigest& own, const parallel::GroupPtr& world) {
  const auto bytes = parallel::all_gather(at::full({1}, own.bytes, at::kLong), world);
  const auto checksums = gather_texts(own.checksum, world);
  std::map<std::string, FileDigest> files;
  for (int rank = 0; rank < world->getSize(); ++rank) {
    const FileDigest digest{bytes[rank].item<int64_t>(), checksums[static_cast<size_t>(rank)]};
    if (digest.bytes > 0) files.emplace(rank_file(rank, world->getSize()), digest);
  }
  return files;
}

/// Rank 0, when all files are written: completes the folder and makes it the latest.
void publish(const fs::path& partial, const fs::path& folder, const CheckpointManifest& manifest) {
  for (const auto& [name, digest] : manifest.files) {
    const auto file = partial / name;
    std::error_code not_there;
    TORCH_CHECK(fs::file_size(file, not_there) == static_cast<uintmax_t>(digest.bytes), file.string(),
                " was written, but rank 0 doesn't see it: the folder must be on a file system that all ranks share");
  }
  write_file(partial / kManifestFile, internal::file_text(manifest));
  const auto directory = folder.parent_path();
  internal::move_into_place(partial, folder);
  internal::flush_folder(directory);
  internal::point_latest(directory, folder.filename());
}

}  // namespace

fs::path save_checkpoint(const fs::path& directory, const CheckpointContents& contents, const parallel::GroupPtr& world,
                         const SaveCheckpointOptions& options) {
  const bool is_first = world->getRank() == 0;
  const auto own_file = rank_file(world->getRank(), world->getSize());
  const auto folder = directory / internal::step_name(contents.step);
  const fs::path partial = partial_of(folder);

  CheckpointManifest own_part;
  parallel::agree_on([&] { own_part = manifest_part(contents, own_file); }, world);
  const auto parts = gather_texts(internal::to_text(own_part), world);
  CheckpointManifest manifest;  // filled on rank 0 only
  try {
    const auto prepare = [&] {
      if (!is_first) return;
      manifest = internal::merge_manifests(parts);
      internal::prepare_folder(directory, partial);
    };
    parallel::agree_on(prepare, world);
    FileDigest own_digest;
    parallel::agree_on([&] { own_digest = write_own_file(partial / own_file, contents.tensors, own_part); }, world);
    manifest.files = gather_digests(own_digest, world);
    parallel::agree_on(
        [&] {
          if (is_first) publish(partial, folder, manifest);
        },
        world);
  } catch (const parallel::AgreedError&) {  // on every rank, so no rank writes any more
    std::error_code ignored;
    if (is_first) fs::remove_all(partial, ignored);
    throw;
  }
  if (is_first && options.keep_last > 0) internal::remove_old(directory, contents.step, options.keep_last);
  return folder;
}

}  // namespace megatron_cpp
