#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cstring>
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
  CheckpointManifest part{contents.step, contents.state, contents.model, contents.tokenizer, {}, {}};
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

void write_own_file(const fs::path& file, const std::vector<ShardedTensor>& tensors, const CheckpointManifest& part) {
  std::vector<NamedTensor> parts;
  for (const auto& tensor : tensors) {
    if (is_written(tensor)) parts.push_back({internal::stored_name(tensor.id, tensor.part), tensor.local});
  }
  if (!parts.empty()) write_safetensors(file, parts, internal::file_metadata(part));
}

/// Rank 0, when all files are written: completes the folder and makes it the latest.
void publish(const fs::path& partial, const fs::path& folder, CheckpointManifest& manifest) {
  for (const auto& [name, tensor] : manifest.tensors) {
    for (const auto& piece : tensor.pieces) {
      const auto [entry, is_new] = manifest.file_bytes.try_emplace(piece.file, 0);
      if (!is_new) continue;
      const auto file = partial / piece.file;
      TORCH_CHECK(fs::is_regular_file(file), file.string(),
                  " was written, but rank 0 doesn't see it: the folder must be on a file system that all ranks share");
      entry->second = static_cast<int64_t>(fs::file_size(file));
    }
  }
  write_file(partial / kManifestFile, internal::to_text(manifest, /*indent=*/1) + "\n");
  const auto directory = folder.parent_path();
  internal::move_into_place(partial, folder);
  internal::flush_folder(directory);
  internal::point_latest(directory, folder.filename());
}

void append_segments(std::vector<ShardedTensor>& result, const ParameterShard& shard, const at::Tensor& values,
                     TensorRole role, const CheckpointName& published_name, const parallel::ProcessGroups& groups) {
  const bool main_replica = groups.of(shard.domain.replicated_over())->getRank() == 0;
  for (const auto& segment : shard.segments) {
    result.push_back({{published_name(segment.name), role},
                      segment.in_local(values.detach()),
                      segment.global_shape,
                      {segment.box},
                      main_replica});
  }
}

}  // namespace

std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters,
                                           const CheckpointName& published_name,
                                           const parallel::ProcessGroups& groups) {
  std::vector<ShardedTensor> result;
  for (const auto& shard : parameters) {
    append_segments(result, shard, shard.parameter, TensorRole::kParameter, published_name, groups);
  }
  return result;
}

std::vector<ShardedTensor> sharded_tensors(const AdamW& optimizer, const CheckpointName& published_name,
                                           const parallel::ProcessGroups& groups) {
  std::vector<ShardedTensor> result;
  for (const auto& slice : optimizer.slices()) {
    const auto& shard = slice.shard;
    TORCH_CHECK_VALUE(slice.elements.length() == shard.parameter.numel(), "the optimizer has a part of ", shard.name,
                      " only: such moments are not saved yet");
    const auto shape = shard.parameter.sizes();
    append_segments(result, shard, slice.exp_avg.view(shape), TensorRole::kExpAvg, published_name, groups);
    append_segments(result, shard, slice.exp_avg_sq.view(shape), TensorRole::kExpAvgSq, published_name, groups);
  }
  return result;
}

fs::path save_checkpoint(const fs::path& directory, const CheckpointContents& contents, const parallel::GroupPtr& world,
                         const SaveCheckpointOptions& options) {
  const bool is_first = world->getRank() == 0;
  const auto own_file = rank_file(world->getRank(), world->getSize());
  const auto folder = directory / internal::step_name(contents.step);
  const fs::path partial = partial_of(folder);

  CheckpointManifest own_part;
  parallel::agree_on([&] { own_part = manifest_part(contents, own_file); }, world);
  const auto parts = gather_texts(internal::to_text(own_part, /*indent=*/-1), world);
  CheckpointManifest manifest;  // filled on rank 0 only
  try {
    const auto prepare = [&] {
      if (!is_first) return;
      manifest = internal::merge_manifests(parts);
      internal::prepare_folder(directory, partial);
    };
    parallel::agree_on(prepare, world);
    parallel::agree_on([&] { write_own_file(partial / own_file, contents.tensors, own_part); }, world);
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
