#include "megatron_cpp/checkpoint/sharded_checkpoint.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fcntl.h>
#include <stdio.h>  // renameat2

#include <algorithm>
#include <charconv>
#include <map>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/safetensors.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"

namespace megatron {

namespace {

namespace fs = std::filesystem;
using internal::CheckpointManifest;
using internal::CheckpointPiece;
using internal::CheckpointTensor;

using internal::flush_folder;
using internal::kManifestFile;
constexpr const char* kLatest = "latest";
constexpr std::string_view kStepPrefix = "step-";
constexpr std::string_view kPartial = ".partial";

// ---------------------------------------------------------------------------------------------------------- names

std::string zero_padded(int64_t number, size_t width) {
  auto digits = std::to_string(number);
  if (digits.size() < width) digits.insert(0, width - digits.size(), '0');
  return digits;
}

std::string step_name(int64_t step) { return std::string(kStepPrefix) + zero_padded(step, 8); }

std::string rank_file(int rank, int num_ranks) {
  return "rank-" + zero_padded(rank, 4) + "-of-" + zero_padded(num_ranks, 4) + ".safetensors";
}

/// The step of a folder called step-N; nothing for any other name, step-N.partial included.
std::optional<int64_t> step_of(const fs::path& folder) {
  const auto name = folder.filename().string();
  if (!name.starts_with(kStepPrefix)) return std::nullopt;
  int64_t step = 0;
  const auto* end = name.data() + name.size();
  const auto [stopped, error] = std::from_chars(name.data() + kStepPrefix.size(), end, step);
  if (error != std::errc() || stopped != end || step < 0) return std::nullopt;
  return step;
}

/// Whether `path` is a folder itself, and no link to one.
bool is_own_folder(const fs::path& path) {
  std::error_code not_there;
  return fs::symlink_status(path, not_there).type() == fs::file_type::directory;
}

/// The step of a checkpoint in `folder`; nothing if there is none, or a broken one.
std::optional<int64_t> step_inside(const fs::path& folder) {
  try {
    return internal::read_manifest(folder).step;
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

/// The folders called step-N, the highest step first. Also `latest`, where it is a folder itself: a copy of a run's
/// directory may have made one of a link, and it may be the only checkpoint there.
std::vector<std::pair<int64_t, fs::path>> step_folders(const fs::path& directory) {
  std::vector<std::pair<int64_t, fs::path>> folders;
  std::error_code not_there;
  if (!fs::is_directory(directory, not_there)) return folders;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const auto step = step_of(entry.path());
    if (step && entry.is_directory(not_there)) folders.emplace_back(*step, entry.path());
  }
  if (is_own_folder(directory / kLatest)) {
    if (const auto step = step_inside(directory / kLatest)) folders.emplace_back(*step, directory / kLatest);
  }
  // Of two with one step, the one called step-N first.
  std::sort(folders.rbegin(), folders.rend());
  return folders;
}

// ------------------------------------------------------------------------------------------------- slices, pieces

void check_slice(const ShardedTensor& tensor) {
  TORCH_CHECK_VALUE(tensor.part.is_in(tensor.global_shape) && tensor.local.sizes() == tensor.part.shape(), "tensor ",
                    tensor.id.text(), " of shape ", at::IntArrayRef(tensor.global_shape), " has no part ",
                    tensor.part.text(), " of shape ", tensor.local.sizes());
}

// --------------------------------------------------------------------------------------------------------- saving

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

/// This rank's part of the manifest: also the tensors that it doesn't write, so that one which nobody writes is
/// noticed.
CheckpointManifest manifest_part(const CheckpointContents& contents, const std::string& file) {
  TORCH_CHECK_VALUE(contents.step >= 0, "checkpoint of step ", contents.step);
  CheckpointManifest part{contents.step, contents.state, contents.model, contents.tokenizer, {}, {}};
  for (const auto& tensor : contents.tensors) {
    check_slice(tensor);
    CheckpointTensor entry{safetensors_dtype(tensor.local.scalar_type(), tensor.id.text()), tensor.global_shape, {}};
    if (is_written(tensor)) {
      entry.pieces.push_back({file, internal::stored_name(tensor.id, tensor.part), tensor.part});
    }
    const bool is_new = part.tensors.emplace(tensor.id, std::move(entry)).second;
    TORCH_CHECK_VALUE(is_new, "tensor ", tensor.id.text(), " is given twice");
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

/// What a killed run left behind, and an empty folder to write to.
void prepare_folder(const fs::path& directory, const fs::path& partial) {
  fs::create_directories(directory);
  for (const auto& entry : fs::directory_iterator(directory)) {
    const auto name = entry.path().filename().string();
    if ((name.starts_with(kStepPrefix) || name.starts_with(kLatest)) && name.ends_with(kPartial)) {
      fs::remove_all(entry.path());
    }
  }
  fs::create_directory(partial);
}

/// Renames `partial` to `folder`. A folder that had this name goes: at one stroke where the file system can exchange
/// two names.
void move_into_place(const fs::path& partial, const fs::path& folder) {
  if (!fs::exists(folder)) {
    fs::rename(partial, folder);
  } else if (::renameat2(AT_FDCWD, partial.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0) {
    fs::remove_all(partial);
  } else {
    const fs::path replaced = folder.string() + ".replaced" + std::string(kPartial);
    fs::rename(folder, replaced);
    fs::rename(partial, folder);
    fs::remove_all(replaced);
  }
}

/// Removes checkpoints up to `step` but the `keep_last` newest. Later ones are of a run that this one didn't start
/// from. What goes wrong is a warning: the other ranks are through, and the new checkpoint is what counts.
void remove_old(const fs::path& directory, int64_t step, int64_t keep_last) {
  try {
    int64_t num_kept = 0;
    for (const auto& [found, folder] : step_folders(directory)) {
      if (folder.filename() == kLatest || found > step || num_kept++ < keep_last) continue;
      const fs::path doomed = folder.string() + std::string(kPartial);
      std::error_code error;
      fs::rename(folder, doomed, error);  // half removed, it must not be called step-N
      if (!error) fs::remove_all(doomed, error);
      if (error) {
        TORCH_WARN("cannot remove the old checkpoint ", folder.string(), ": ", error.message());
      }
    }
  } catch (const std::exception& error) {
    TORCH_WARN("cannot remove old checkpoints in ", directory.string(), ": ", parallel::error_text(error));
  }
}

/// Clears the way for a link where `latest` is a folder. Its checkpoint gets the name of its step, unless that has one.
/// @return whether a link can be made there.
bool clear_latest_folder(const fs::path& latest) {
  if (!is_own_folder(latest)) return true;
  const auto step = step_inside(latest);
  if (!step) {
    TORCH_WARN_ONCE(latest.string(), " is a folder, and no checkpoint: it is left alone, and no link made");
    return false;
  }
  const auto own_name = latest.parent_path() / step_name(*step);
  if (fs::exists(own_name)) {
    const fs::path doomed = latest.string() + std::string(kPartial);
    fs::rename(latest, doomed);  // half removed, it must not be called latest
    fs::remove_all(doomed);
  } else {
    fs::rename(latest, own_name);
  }
  TORCH_WARN(latest.string(), " was a folder, as copies of links are: a link takes its place");
  return true;
}

/// Makes `latest` a link to the folder `name`. A file system may have no links: then there is no `latest`, rather than
/// an old one.
void point_latest(const fs::path& directory, const fs::path& name) {
  const auto latest = directory / kLatest;
  if (!clear_latest_folder(latest)) return;
  const auto link = directory / (kLatest + std::string(kPartial));
  std::error_code error;
  std::error_code ignored;
  fs::create_directory_symlink(name, link, error);
  if (!error) fs::rename(link, latest, error);
  TORCH_CHECK(!internal::means_lost_data(error.value()), "cannot make the link ", latest.string(), ": ",
              error.message());
  if (error) {
    fs::remove(link, ignored);
    fs::remove(latest, ignored);
    TORCH_WARN_ONCE("cannot make the link ", latest.string(), ": ", error.message(),
                    "; readers look for the highest step");
    return;
  }
  flush_folder(directory);
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
  move_into_place(partial, folder);
  flush_folder(directory);
  point_latest(directory, folder.filename());
}

// -------------------------------------------------------------------------------------------------------- loading

/// A box of a part, and where its elements begin in a tensor that holds the part, if that has one dimension.
struct PlacedBox {
  Box box;
  int64_t first = 0;
};

std::vector<PlacedBox> placed_boxes(const TensorPart& part) {
  std::vector<PlacedBox> result;
  int64_t first = 0;
  for (auto& box : part.boxes()) {
    const int64_t numel = box.numel();
    result.push_back({std::move(box), first});
    first += numel;
  }
  return result;
}

/// Calls `action` with each box of `piece` and of `wanted` that share elements, and these.
template <class Action>
void for_each_overlap(const TensorPart& piece, const TensorPart& wanted, const Action& action) {
  const auto wanted_boxes = placed_boxes(wanted);
  for (const auto& stored : placed_boxes(piece)) {
    for (const auto& asked : wanted_boxes) {
      if (const auto shared = intersection(stored.box, asked.box)) action(stored, asked, *shared);
    }
  }
}

bool overlaps(const TensorPart& piece, const TensorPart& wanted) {
  bool result = false;
  for_each_overlap(piece, wanted, [&](const auto&...) { result = true; });
  return result;
}

/// A view of `shared` in a tensor that holds `part`, of which `placed` is a box.
at::Tensor view_in(const at::Tensor& tensor, const TensorPart& part, const PlacedBox& placed, const Box& shared) {
  if (!part.elements) return view_of(tensor, placed.box, shared);
  return view_of(tensor.narrow(0, placed.first, placed.box.numel()).view(placed.box.length), placed.box, shared);
}

void copy_overlap(const SafetensorsFile& file, const CheckpointPiece& piece, const ShardedTensor& wanted) {
  for_each_overlap(piece.part, wanted.part, [&](const PlacedBox& stored, const PlacedBox& asked, const Box& shared) {
    const auto target = view_in(wanted.local, wanted.part, asked, shared);
    if (piece.part.elements) {
      const Box run{{stored.first}, {stored.box.numel()}};
      target.copy_(view_of(file.read(piece.key, run).view(stored.box.length), stored.box, shared));
    } else {
      Box relative = shared;
      for (size_t d = 0; d < relative.begin.size(); ++d) relative.begin[d] -= stored.box.begin[d];
      target.copy_(file.read(piece.key, relative));
    }
  });
}

/// The file of a piece, opened unless it is open. Refuses one that doesn't hold what the manifest says.
const SafetensorsFile& open_piece(const fs::path& folder, const CheckpointPiece& piece, const TensorId& id,
                                  const CheckpointTensor& tensor, std::map<std::string, SafetensorsFile>& open_files) {
  auto found = open_files.find(piece.file);
  if (found == open_files.end()) {
    try {
      found = open_files.emplace(piece.file, SafetensorsFile(folder / piece.file)).first;
    } catch (const c10::Error& error) {
      TORCH_CHECK_VALUE(false, "tensor ", id.text(), ": ", error.what_without_backtrace());
    }
  }
  const auto& file = found->second;
  const auto expected = piece.part.shape();
  const auto entry = file.entries().find(piece.key);
  TORCH_CHECK_VALUE(entry != file.entries().end(), file.path().string(), ": no tensor ", piece.key,
                    ", the manifest says that a piece of ", id.text(), " is there");
  TORCH_CHECK_VALUE(entry->second.shape == expected && entry->second.dtype_name == tensor.dtype, file.path().string(),
                    ": tensor ", piece.key, " is ", entry->second.dtype_name, " ", at::IntArrayRef(entry->second.shape),
                    ", the manifest says ", tensor.dtype, " ", at::IntArrayRef(expected));
  return file;
}

/// Without separators at the end, or a "." there.
fs::path without_ending(fs::path path) {
  while (path.has_parent_path() && (path.filename().empty() || path.filename() == ".")) path = path.parent_path();
  return path;
}

/// The step that `latest` holds; nothing if it leads to no checkpoint.
std::optional<int64_t> step_of_latest(const fs::path& latest) {
  std::error_code not_there;
  if (!fs::is_regular_file(latest / kManifestFile, not_there)) return std::nullopt;
  if (const auto step = step_of(fs::canonical(latest))) return step;
  return step_inside(latest);
}

// --------------------------------------------------------------------------------------------------- what to save

void append_segments(std::vector<ShardedTensor>& result, const ParameterShard& shard, const at::Tensor& values,
                     TensorRole role, const CheckpointName& published_name, const parallel::ProcessGroups& groups) {
  const bool is_whole = shard.domain.sharded_over.empty();
  const bool main_replica = groups.dp->getRank() == 0 && (!is_whole || groups.tp->getRank() == 0);
  for (const auto& segment : shard.segments) {
    result.push_back({{published_name(segment.name), role},
                      segment.in_local(values.detach()),
                      segment.global_shape,
                      {segment.box},
                      main_replica});
  }
}

}  // namespace

std::string TensorId::text() const {
  return role == TensorRole::kParameter ? name : internal::role_text(role) + " of " + name;
}

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
  for (size_t i = 0; i < optimizer.parameters().size(); ++i) {
    const auto& shard = optimizer.parameters()[i];
    const auto& moments = optimizer.moments()[i];
    append_segments(result, shard, moments.exp_avg, TensorRole::kExpAvg, published_name, groups);
    append_segments(result, shard, moments.exp_avg_sq, TensorRole::kExpAvgSq, published_name, groups);
  }
  return result;
}

fs::path save_checkpoint(const fs::path& directory, const CheckpointContents& contents, const parallel::GroupPtr& world,
                         const SaveCheckpointOptions& options) {
  const bool is_first = world->getRank() == 0;
  const auto own_file = rank_file(world->getRank(), world->getSize());
  const auto folder = directory / step_name(contents.step);
  const fs::path partial = folder.string() + std::string(kPartial);

  CheckpointManifest own_part;
  parallel::agree_on([&] { own_part = manifest_part(contents, own_file); }, world);
  const auto parts = gather_texts(internal::to_text(own_part, /*indent=*/-1), world);
  CheckpointManifest manifest;  // of rank 0 alone
  try {
    const auto prepare = [&] {
      if (!is_first) return;
      manifest = internal::merge_manifests(parts);
      prepare_folder(directory, partial);
    };
    parallel::agree_on(prepare, world);
    parallel::agree_on([&] { write_own_file(partial / own_file, contents.tensors, own_part); }, world);
    parallel::agree_on(
        [&] {
          if (is_first) publish(partial, folder, manifest);
        },
        world);
  } catch (const parallel::AgreedError&) {  // on every rank: nobody writes any more
    std::error_code ignored;
    if (is_first) fs::remove_all(partial, ignored);
    throw;
  }
  if (is_first && options.keep_last > 0) remove_old(directory, contents.step, options.keep_last);
  return folder;
}

fs::path find_checkpoint(const fs::path& given) {
  const auto path = without_ending(given);
  std::error_code not_there;
  const bool is_latest = path.filename() == kLatest;
  if (!is_latest && fs::is_regular_file(path / kManifestFile, not_there)) return fs::canonical(path);
  const auto directory = is_latest ? (path.has_parent_path() ? path.parent_path() : fs::path(".")) : path;
  const auto latest = directory / kLatest;
  const auto step = step_of_latest(latest);
  const auto folders = step_folders(directory);
  // A link was made last; a folder is a copy of one, which later steps have not changed.
  const bool is_newest = !is_own_folder(latest) || folders.empty() || *step >= folders.front().first;
  if (step && is_newest) return fs::canonical(latest);
  TORCH_CHECK_VALUE(!folders.empty(), path.string(), " is no checkpoint: neither ", kManifestFile, " nor ", kLatest,
                    "/", kManifestFile, " is there");
  const auto newest = latest_checkpoint(directory);
  const auto why = step ? c10::str(" is of step ", *step, "; taking ") : std::string(" is not there; taking ");
  TORCH_WARN(latest.string(), why, newest->string());
  return fs::canonical(*newest);
}

void remove_checkpoints(const fs::path& directory) {
  std::error_code not_there;
  if (!fs::is_directory(directory, not_there)) return;
  std::vector<fs::path> ours;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const auto name = entry.path().filename().string();
    const bool is_partial = (name.starts_with(kStepPrefix) || name.starts_with(kLatest)) && name.ends_with(kPartial);
    if (step_of(entry.path()) || name == kLatest || is_partial) ours.push_back(entry.path());
  }
  for (const auto& path : ours) fs::remove_all(path);
}

CheckpointReader::CheckpointReader(const fs::path& path)
    : folder_(find_checkpoint(path)),
      manifest_(std::make_shared<CheckpointManifest>(internal::read_manifest(folder_))) {}

int64_t CheckpointReader::step() const { return manifest_->step; }

const std::string& CheckpointReader::state() const { return manifest_->state; }

const std::string& CheckpointReader::model() const { return manifest_->model; }

const std::string& CheckpointReader::tokenizer() const { return manifest_->tokenizer; }

std::vector<TensorId> CheckpointReader::tensors() const {
  std::vector<TensorId> result;
  result.reserve(manifest_->tensors.size());
  for (const auto& [id, tensor] : manifest_->tensors) result.push_back(id);
  return result;
}

bool CheckpointReader::contains(const TensorId& id) const { return manifest_->tensors.count(id) > 0; }

const std::vector<int64_t>& CheckpointReader::global_shape(const TensorId& id) const {
  const auto found = manifest_->tensors.find(id);
  TORCH_CHECK_VALUE(found != manifest_->tensors.end(), (folder_ / kManifestFile).string(), ": no tensor ", id.text());
  return found->second.shape;
}

void CheckpointReader::load(const std::vector<ShardedTensor>& tensors, UnusedTensors unused) const {
  const auto manifest_file = (folder_ / kManifestFile).string();
  std::set<TensorId> asked;
  std::map<std::string, SafetensorsFile> open_files;
  struct Copy {
    const SafetensorsFile& file;
    const CheckpointPiece& piece;
    const ShardedTensor& wanted;
  };
  std::vector<Copy> copies;
  for (const auto& wanted : tensors) {
    check_slice(wanted);
    asked.insert(wanted.id);
    const auto found = manifest_->tensors.find(wanted.id);
    TORCH_CHECK_VALUE(found != manifest_->tensors.end(), manifest_file, ": no tensor ", wanted.id.text(),
                      "; asked for one of shape ", at::IntArrayRef(wanted.global_shape));
    const auto& tensor = found->second;
    const auto dtype = safetensors_dtype(wanted.local.scalar_type(), wanted.id.text());
    TORCH_CHECK_VALUE(tensor.shape == wanted.global_shape && tensor.dtype == dtype, manifest_file, ": tensor ",
                      wanted.id.text(), " is ", tensor.dtype, " ", at::IntArrayRef(tensor.shape), ", asked for as ",
                      dtype, " ", at::IntArrayRef(wanted.global_shape));
    for (const auto& piece : tensor.pieces) {
      if (!overlaps(piece.part, wanted.part)) continue;
      copies.push_back({open_piece(folder_, piece, wanted.id, tensor, open_files), piece, wanted});
    }
  }
  for (const auto& [id, tensor] : manifest_->tensors) {
    TORCH_CHECK_VALUE(unused == UnusedTensors::kAllow || asked.count(id) > 0, manifest_file, ": tensor ", id.text(),
                      " of shape ", at::IntArrayRef(tensor.shape), " is not asked for");
  }
  const at::NoGradGuard no_grad;
  for (const auto& [file, piece, wanted] : copies) copy_overlap(file, piece, wanted);
}

std::optional<fs::path> latest_checkpoint(const fs::path& directory) {
  const auto folders = step_folders(directory);
  std::string reason;
  for (const auto& [step, folder] : folders) {
    try {
      internal::check_files(folder, internal::read_manifest(folder));
      return folder;
    } catch (const std::exception& error) {
      reason = parallel::error_text(error);
      TORCH_WARN("passing over the broken checkpoint ", folder.string(), ": ", reason);
    }
  }
  TORCH_CHECK_VALUE(folders.empty(), "none of the ", folders.size(), " checkpoints in ", directory.string(),
                    " can be read; the last one looked at: ", reason);
  return std::nullopt;
}

}  // namespace megatron
