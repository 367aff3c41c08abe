// Saves checkpoints while training goes on.
//
//   CheckpointSaver saver(directory, groups.world, {.keep_last = 2});
//   trainer_options.before_update = [&] { saver.synchronize_staging(); };
//   for (...) {
//     trainer.step(...);
//     saver.poll();
//     if (step % interval == 0) {
//       saver.start({.step = step, .state = state, .tensors = sharded_tensors(...)}, Staging::kInBackground);
//     }
//   }
//   saver.finish();
#pragma once

#include <filesystem>
#include <memory>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/group.h"

namespace megatron_cpp {

namespace internal {
class CheckpointSave;
class HostCopy;
}  // namespace internal

/// When CheckpointSaver copies the values of a checkpoint to host memory, which PyTorch's asynchronous saves call
/// staging.
enum class Staging {
  kBeforeReturn,  ///< in start(): the tensors may change as soon as it has returned
  kInBackground,  ///< after start(), beside the next step's forward and backward pass, which only read parameters and
                  ///< optimizer state: the tensors must not change before synchronize_staging() has returned
};

/// Writes what save_checkpoint writes, in the same order, on threads of its own, which send nothing: they copy the
/// values to host memory and write them, poll() and finish() take the save on when all ranks are there. step-N gets
/// its name, and `latest` moves, when every rank's file is on disk. One save at a time. At any moment a process may be
/// killed: step-N is whole or isn't there, and older checkpoints are removed last.
///
/// Beside the tensors themselves the host holds the bytes of this rank's file, from the first save to the destructor;
/// of tensors on a GPU in pinned memory. That memory is new in the first save only, so later ones copy faster.
///
/// Saves of one object must not overlap with other saves into the same directory.
class CheckpointSaver {
 public:
  /// Nothing is read or written yet.
  /// @param directory  as save_checkpoint takes it.
  /// @param world      all ranks that save; carries the agreements. Not collective.
  CheckpointSaver(std::filesystem::path directory, parallel::GroupPtr world, const SaveCheckpointOptions& options = {});
  /// A save that isn't finished is abandoned, as if the process had been killed: the writer stops after the tensor at
  /// hand and is waited for, and the next save removes what it wrote. For exceptions; otherwise call finish() before.
  /// Not collective.
  ~CheckpointSaver();
  CheckpointSaver(const CheckpointSaver&) = delete;
  CheckpointSaver& operator=(const CheckpointSaver&) = delete;

  /// Begins to save: checks what save_checkpoint checks, begins to copy the values of the tensors that this rank
  /// writes, and returns. If the save before is still being written it is finished first; the first time, rank 0 warns
  /// how long that took, since training stood still.
  /// @throws parallel::AgreedError on every rank as save_checkpoint, or as poll() for the save before; no save is then
  ///         pending.
  /// Collective over the world: the first two all-gathers of save_checkpoint, two calls of agree(), and finish().
  void start(const CheckpointContents& contents, Staging staging = Staging::kBeforeReturn);

  /// Returns when the values of a pending save are copied, after which the tensors may change; TrainerOptions has a
  /// place for it. At once if there is none. A copy that fails is an error of poll() and finish(). Not collective.
  void synchronize_staging();

  /// Takes a pending save on if every rank has come so far; call it after each step. It never waits for a disk.
  /// @return whether a save is pending afterwards; equal on every rank.
  /// @throws parallel::AgreedError on every rank, naming the first that couldn't write; `latest` and older checkpoints
  ///         stay, what was written of this one is removed, and no save is pending.
  /// Collective over the world, at the same step on every rank; while a save is pending an all-reduce of one number,
  /// twice in a save the rest of what save_checkpoint sends; otherwise nothing is sent.
  bool poll();
  /// The same for a training loop that has an all-reduce in each step anyway: takes the save on if `all_are_ready`, the
  /// minimum of is_ready() over the world.
  bool poll(bool all_are_ready);
  /// Whether this rank has come so far that a pending save can be taken on; true if there is none. Not collective.
  bool is_ready() const;

  /// Waits until the pending save is whole; returns at once if there is none. Throws as poll(). Collective over the
  /// world.
  void finish();

  /// Whether a save was started and isn't finished yet; equal on every rank. Not collective.
  bool is_pending() const { return save_ != nullptr; }

 private:
  bool all_are_ready() const;
  void advance();

  std::filesystem::path directory_;
  parallel::GroupPtr world_;
  SaveCheckpointOptions options_;
  std::unique_ptr<internal::HostCopy> host_copy_;
  std::unique_ptr<internal::CheckpointSave> save_;  ///< the pending one, which reads host_copy_
  bool has_warned_ = false;
};

}  // namespace megatron_cpp
