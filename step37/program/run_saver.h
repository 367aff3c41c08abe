// The checkpoints of a training run, and what becomes of it when they can't be written.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>

#include "megatron_cpp/checkpoint/checkpoint_saver.h"
#include "parallel/group.h"
#include "step37/program/run_config.h"

namespace megatron_cpp::step37 {

/// Saves as CheckpointSection says. With WriteErrorAction::kContinue a checkpoint that can't be written is a warning on
/// rank 0: older ones and `latest` stay, what was written of it is removed, and the next save tries again. All
/// functions that don't say otherwise are collective over the world; each throws what save_checkpoint throws.
class RunSaver {
 public:
  /// Nothing is written yet.
  RunSaver(const std::filesystem::path& directory, const parallel::GroupPtr& world, const CheckpointSection& section);

  /// Saves a checkpoint, or begins to (CheckpointSection::asynchronous). Afterwards the tensors must not change before
  /// synchronize_staging() has returned.
  void save(const CheckpointContents& contents);

  /// CheckpointSaver::synchronize_staging. Not collective.
  void synchronize_staging() { saver_.synchronize_staging(); }

  /// CheckpointSaver::is_ready. Not collective.
  bool is_ready() const { return saver_.is_ready(); }

  /// Takes a save that has begun on; call it after each step, with the minimum of is_ready() over the world.
  void poll(bool all_are_ready);

  /// Waits for a save that has begun. If the checkpoint of the run's last step isn't there then, saves it; that this
  /// can't be written is always an error.
  /// @param contents  of the last step.
  void finish(const CheckpointContents& contents);

 private:
  void try_to(const std::function<void()>& action);

  std::filesystem::path directory_;
  parallel::GroupPtr world_;
  CheckpointSection section_;
  SaveCheckpointOptions options_;
  CheckpointSaver saver_;
  int64_t saved_ = -1;  ///< the step whose checkpoint is there, or is being written
};

}  // namespace megatron_cpp::step37
