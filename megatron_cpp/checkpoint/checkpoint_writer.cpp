#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <future>
#include <map>
#include <optional>
#include <utility>

#include "megatron_cpp/checkpoint/checkpoint_folder.h"
#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "megatron_cpp/checkpoint/checkpoint_saver.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/checkpoint/save_points.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/activity.h"
#include "parallel/agree.h"
#include "parallel/collectives.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;
using internal::CheckpointManifest;
using internal::CheckpointTensor;
using internal::kManifestFile;
using internal::save_point;
using parallel::gather_texts;

std::string rank_file(int rank, int num_ranks) {
  return fmt::format("rank-{:04}-of-{:04}.safetensors", rank, num_ranks);
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

/// What this rank writes, as it is called in its file.
std::vector<NamedTensor> written_tensors(const std::vector<ShardedTensor>& tensors) {
  std::vector<NamedTensor> written;
  for (const auto& tensor : tensors) {
    if (is_written(tensor)) written.push_back({internal::stored_name(tensor.id, tensor.part), tensor.local});
  }
  return written;
}

/// Returns what was written: nothing if there is no tensor.
/// @throws c10::Error if `is_abandoned` becomes true.
FileDigest write_own_file(const fs::path& file, const std::vector<NamedTensor>& tensors,
                          const std::map<std::string, std::string>& metadata, const std::atomic<bool>& is_abandoned) {
  if (tensors.empty()) return {};
  const parallel::Phase phase("writing a checkpoint's file");
  SafetensorsWriter writer(file, SafetensorsWriter::entries_of(tensors), metadata);
  save_point("file_open");
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(!is_abandoned, file.string(), " is abandoned");
    writer.write(tensors[i].tensor);
    if (i == tensors.size() / 2) save_point("half_written");
  }
  save_point("written");
  auto digest = writer.commit();
  save_point("file_renamed");
  return digest;
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
  const parallel::Phase phase("publishing a checkpoint");
  save_point("files_written");
  for (const auto& [name, digest] : manifest.files) {
    const auto file = partial / name;
    std::error_code not_there;
    TORCH_CHECK(fs::file_size(file, not_there) == static_cast<uintmax_t>(digest.bytes), file.string(),
                " was written, but rank 0 doesn't see it: the folder must be on a file system that all ranks share");
  }
  write_file(partial / kManifestFile, internal::file_text(manifest));
  save_point("manifest_written");
  const auto directory = folder.parent_path();
  internal::move_into_place(partial, folder);
  internal::flush_folder(directory);
  save_point("folder_renamed");
  internal::point_latest(directory, folder.filename());
}

}  // namespace

namespace internal {

/// Host memory for the values of a save, kept from save to save.
class HostCopy {
 public:
  /// Copies of `tensors`, which stay as they are until the next call. Any thread may call it.
  /// @param queued  for tensors on a GPU: comes after the work that gives them their values.
  std::vector<NamedTensor> of(const std::vector<NamedTensor>& tensors, const std::optional<c10::Event>& queued) {
    const parallel::Phase phase("copying a checkpoint's values");
    constexpr int64_t kAlignment = 64;
    int64_t bytes = 0;
    for (const auto& [name, tensor] : tensors) {
      bytes += (static_cast<int64_t>(tensor.nbytes()) + kAlignment - 1) / kAlignment * kAlignment;
    }
    const auto gpu = gpu_of(tensors);
    // Beside the work of the training step, which has the current stream of its own thread.
    std::optional<c10::StreamGuard> beside;
    if (gpu) {
      beside.emplace(c10::impl::VirtualGuardImpl(gpu->type()).getStreamFromGlobalPool(*gpu));
      queued->block(beside->current_stream());
    }
    if (!memory_.defined() || memory_.numel() < bytes || memory_.is_pinned() != gpu.has_value()) {
      memory_.reset();  // before there is other memory
      memory_ = at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(gpu.has_value()));
    }
    std::vector<NamedTensor> copies;
    int64_t begin = 0;
    for (const auto& [name, tensor] : tensors) {
      const auto size = static_cast<int64_t>(tensor.nbytes());
      auto copy = memory_.narrow(0, begin, size).view(tensor.scalar_type()).view(tensor.sizes());
      if (tensor.is_cpu() && tensor.is_contiguous()) {
        // copy_ would share a large tensor out over as many new threads as the training step has.
        if (size > 0) std::memcpy(copy.mutable_data_ptr(), tensor.const_data_ptr(), static_cast<size_t>(size));
      } else {
        copy.copy_(tensor.detach(), /*non_blocking=*/true);
      }
      copies.push_back({name, std::move(copy)});
      begin += (size + kAlignment - 1) / kAlignment * kAlignment;
    }
    if (beside) beside->current_stream().synchronize();
    return copies;
  }

  /// What of() waits for: the end of the work on `tensors` that is queued now.
  static std::optional<c10::Event> queued_work(const std::vector<NamedTensor>& tensors) {
    const auto gpu = gpu_of(tensors);
    if (!gpu) return std::nullopt;
    std::optional<c10::Event> event(gpu->type());
    event->record(c10::impl::VirtualGuardImpl(gpu->type()).getStream(*gpu));
    return event;
  }

 private:
  static std::optional<c10::Device> gpu_of(const std::vector<NamedTensor>& tensors) {
    for (const auto& [name, tensor] : tensors) {
      if (!tensor.is_cpu()) return tensor.device();
    }
    return std::nullopt;
  }

  at::Tensor memory_;
};

/// One save, from the check of what it covers to `latest`.
class CheckpointSave {
 public:
  /// Begins. Collective.
  /// @param copy  null: the calling thread writes in advance(), from the tensors themselves. Otherwise other threads
  ///              copy and write.
  CheckpointSave(const fs::path& directory, const CheckpointContents& contents, const parallel::GroupPtr& world,
                 const SaveCheckpointOptions& options, HostCopy* copy)
      : folder_(directory / step_name(contents.step)),
        partial_(partial_of(folder_)),
        step_(contents.step),
        world_(world),
        options_(options),
        // Where no thread can be started, advance() writes.
        policy_(copy == nullptr ? std::launch::deferred : std::launch::async | std::launch::deferred) {
    const parallel::Phase phase("saving");
    const auto own_file = rank_file(world->getRank(), world->getSize());
    CheckpointManifest own_part;
    std::vector<NamedTensor> tensors;
    const auto take = [&] {
      own_part = manifest_part(contents, own_file);
      tensors = written_tensors(contents.tensors);
    };
    parallel::agree_on(take, world);
    const auto parts = gather_texts(to_text(own_part), world);
    const auto prepare = [&] {
      if (!is_first()) return;
      manifest_ = merge_manifests(parts);
      prepare_folder(directory, partial_);
    };
    undone_if_it_fails([&] { parallel::agree_on(prepare, world); });
    auto queued = copy != nullptr ? HostCopy::queued_work(tensors) : std::nullopt;
    staged_ = std::async(policy_, [copy, tensors = std::move(tensors), queued = std::move(queued)] {
      auto values = copy != nullptr ? copy->of(tensors, queued) : tensors;
      save_point("copied");
      return values;
    });
    written_ = std::async(policy_, [this, file = partial_ / own_file, metadata = file_metadata(own_part)] {
      return write_own_file(file, staged_.get(), metadata, is_abandoned_);
    });
  }

  /// Waits for this rank's threads, if there are some.
  ~CheckpointSave() { is_abandoned_ = true; }
  CheckpointSave(const CheckpointSave&) = delete;
  CheckpointSave& operator=(const CheckpointSave&) = delete;

  bool is_done() const { return is_done_; }
  int64_t step() const { return step_; }
  const fs::path& folder() const { return folder_; }

  /// Waits for the copies. Not collective.
  void synchronize_staging() const {
    const parallel::Phase phase("waiting for the copies of a checkpoint's values");
    staged_.wait();
  }

  /// Whether advance() has nothing to wait for on this rank. Not collective.
  bool is_ready() const {
    const auto has_ended = [](const auto& future) {
      return !future.valid() || future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    };
    return has_ended(written_) && has_ended(published_);
  }

  /// Waits for the ranks' files, and begins to publish them; or waits until that is done. Collective.
  /// @throws parallel::AgreedError
  void advance() {
    const parallel::Phase phase("saving");
    undone_if_it_fails([&] { written_.valid() ? collect_files() : finish(); });
  }

 private:
  bool is_first() const { return world_->getRank() == 0; }

  void collect_files() {
    FileDigest own_digest;
    parallel::agree_on([&] { own_digest = written_.get(); }, world_);
    manifest_.files = gather_digests(own_digest, world_);
    if (!is_first()) return;
    published_ = std::async(policy_, [this] {
      publish(partial_, folder_, manifest_);
      if (options_.keep_last > 0) remove_old(folder_.parent_path(), step_, options_.keep_last);
    });
  }

  void finish() {
    parallel::agree_on(
        [&] {
          if (published_.valid()) published_.get();
        },
        world_);
    is_done_ = true;
  }

  template <class Action>
  void undone_if_it_fails(const Action& action) {
    try {
      action();
    } catch (const parallel::AgreedError&) {  // on every rank, so no rank writes any more
      std::error_code ignored;
      if (is_first()) fs::remove_all(partial_, ignored);
      throw;
    }
  }

  fs::path folder_;
  fs::path partial_;
  int64_t step_;
  parallel::GroupPtr world_;
  SaveCheckpointOptions options_;
  std::launch policy_;
  CheckpointManifest manifest_;  ///< on rank 0
  std::atomic<bool> is_abandoned_{false};
  bool is_done_ = false;
  // Their destructors wait, before the members above are gone.
  std::shared_future<std::vector<NamedTensor>> staged_;
  std::future<FileDigest> written_;
  std::future<void> published_;
};

}  // namespace internal

fs::path save_checkpoint(const fs::path& directory, const CheckpointContents& contents, const parallel::GroupPtr& world,
                         const SaveCheckpointOptions& options) {
  internal::CheckpointSave save(directory, contents, world, options, /*copy=*/nullptr);
  while (!save.is_done()) save.advance();
  return save.folder();
}

CheckpointSaver::CheckpointSaver(fs::path directory, parallel::GroupPtr world, const SaveCheckpointOptions& options)
    : directory_(std::move(directory)),
      world_(std::move(world)),
      options_(options),
      host_copy_(std::make_unique<internal::HostCopy>()) {}

CheckpointSaver::~CheckpointSaver() = default;

void CheckpointSaver::start(const CheckpointContents& contents, Staging staging) {
  if (is_pending() && !all_are_ready()) {
    const auto begin = std::chrono::steady_clock::now();
    const auto step = save_->step();
    finish();
    const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - begin;
    if (world_->getRank() == 0 && !std::exchange(has_warned_, true)) {
      TORCH_WARN("the checkpoint of step ", step, " was still being written when that of step ", contents.step,
                 " was due: training waited ", fmt::format("{:.3g}", waited.count()),
                 " s for it, and will again; save less often, or to a faster disk");
    }
  }
  finish();
  save_ = std::make_unique<internal::CheckpointSave>(directory_, contents, world_, options_, host_copy_.get());
  if (staging == Staging::kBeforeReturn) synchronize_staging();
}

void CheckpointSaver::synchronize_staging() {
  if (is_pending()) save_->synchronize_staging();
}

bool CheckpointSaver::is_ready() const { return !is_pending() || save_->is_ready(); }

bool CheckpointSaver::poll() { return poll(is_pending() && all_are_ready()); }

bool CheckpointSaver::poll(bool all_are_ready) {
  if (is_pending() && all_are_ready) advance();
  return is_pending();
}

void CheckpointSaver::finish() {
  while (is_pending()) advance();
}

bool CheckpointSaver::all_are_ready() const {
  const auto own = at::full({1}, is_ready() ? 1 : 0, at::kInt);
  return parallel::all_reduce(own, world_, parallel::Reduction::kMin).item<int>() == 1;
}

void CheckpointSaver::advance() {
  try {
    save_->advance();
  } catch (const parallel::AgreedError&) {
    save_.reset();
    throw;
  }
  if (save_->is_done()) save_.reset();
}

}  // namespace megatron_cpp
