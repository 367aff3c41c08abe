#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cstring>
#include <map>
#include <set>
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

/// Whether this rank writes its elements of a parameter: of the ranks that hold the same ones only the first does.
bool writes(const GradientDomain& domain, bool is_divided, const parallel::ProcessGroups& groups) {
  const auto replicas = domain.replicated_over();
  if (!is_divided) return groups.of(replicas)->getRank() == 0;
  // Divided over the group that gradients are summed over. If the parameter has more replicas, these are over tp.
  return domain.summed_over == replicas || groups.tp->getRank() == 0;
}

/// A box of a rank's tensor, and its values, in the shape of the box.
struct LocalPart {
  Box box;
  at::Tensor values;
};

/// The part of a segment that the boxes of a rank's tensor hold; without elements if they hold none.
void append_segment(std::vector<ShardedTensor>& result, const ParameterSegment& segment,
                    const std::vector<LocalPart>& parts, const at::TensorOptions& options, const TensorId& id,
                    bool is_written) {
  bool is_empty = true;
  for (const auto& [box, values] : parts) {
    const auto held = intersection(box, {segment.local_begin, segment.box.length});
    if (!held) continue;
    is_empty = false;
    Box global = *held;
    for (size_t d = 0; d < global.begin.size(); ++d) {
      global.begin[d] += segment.box.begin[d] - segment.local_begin[d];
    }
    result.push_back({id, view_of(values, box, *held), segment.global_shape, {std::move(global)}, is_written});
  }
  if (!is_empty) return;
  Box nothing = segment.box;
  nothing.length.front() = 0;
  const auto values = at::empty(nothing.length, options);
  result.push_back({id, values, segment.global_shape, {std::move(nothing)}, is_written});
}

/// `values` are those of the elements `range` of a tensor of this shape.
std::vector<LocalPart> local_parts(const at::Tensor& values, at::IntArrayRef shape, parallel::Range range) {
  std::vector<LocalPart> parts;
  int64_t first = 0;
  for (auto& box : boxes_of_range(Box::whole(shape.vec()), range)) {
    const int64_t numel = box.numel();
    auto part = values.narrow(0, first, numel).view(box.length);
    parts.push_back({std::move(box), std::move(part)});
    first += numel;
  }
  return parts;
}

}  // namespace

std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters,
                                           const CheckpointName& published_name,
                                           const parallel::ProcessGroups& groups) {
  std::vector<ShardedTensor> result;
  for (const auto& shard : parameters) {
    const auto values = shard.parameter.detach();
    for (const auto& segment : shard.segments) {
      append_segment(result, segment, {{Box::whole(values.sizes().vec()), values}}, values.options(),
                     {published_name(segment.name)}, writes(shard.domain, /*is_divided=*/false, groups));
    }
  }
  return result;
}

std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters, const AdamW& optimizer,
                                           const CheckpointName& published_name,
                                           const parallel::ProcessGroups& groups) {
  std::set<std::string> updated;
  for (const auto& slice : optimizer.slices()) updated.insert(slice.shard.name);
  std::vector<ParameterShard> others;
  for (const auto& shard : parameters) {
    if (!updated.contains(shard.name)) others.push_back(shard);
  }
  auto result = sharded_tensors(others, published_name, groups);
  for (const auto& slice : optimizer.slices()) {
    const auto& shard = slice.shard;
    const bool is_written = writes(shard.domain, slice.is_divided, groups);
    for (const auto& [role, values] : {std::pair{TensorRole::kParameter, slice.main},
                                       {TensorRole::kExpAvg, slice.exp_avg},
                                       {TensorRole::kExpAvgSq, slice.exp_avg_sq}}) {
      const auto parts = local_parts(values, shard.parameter.sizes(), slice.elements);
      for (const auto& segment : shard.segments) {
        append_segment(result, segment, parts, values.options(), {published_name(segment.name), role}, is_written);
      }
    }
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
