#include "step37/program/run_saver.h"

#include <c10/util/Exception.h>

#include "parallel/errors.h"

namespace megatron_cpp::step37 {

RunSaver::RunSaver(const std::filesystem::path& directory, const parallel::GroupPtr& world,
                   const CheckpointSection& section)
    : directory_(directory),
      world_(world),
      section_(section),
      options_{.keep_last = section.keep},
      saver_(directory, world, options_) {}

void RunSaver::save(const CheckpointContents& contents) {
  try_to([&] {
    if (section_.asynchronous) {
      saver_.start(contents, Staging::kInBackground);
    } else {
      save_checkpoint(directory_, contents, world_, options_);
    }
    saved_ = contents.step;
  });
}

void RunSaver::poll(bool all_are_ready) {
  try_to([&] { saver_.poll(all_are_ready); });
}

void RunSaver::finish(const CheckpointContents& contents) {
  try_to([&] { saver_.finish(); });
  if (saved_ != contents.step) save_checkpoint(directory_, contents, world_, options_);
}

void RunSaver::try_to(const std::function<void()>& action) {
  try {
    action();
  } catch (const parallel::AgreedError& error) {
    const bool may_fail = section_.on_error == WriteErrorAction::kContinue;
    if (!may_fail || error.exit_status() != parallel::kCannotWriteStatus) throw;
    saved_ = -1;
    if (world_->getRank() == 0) {
      TORCH_WARN("a checkpoint is left out: ", error.what(), "; training goes on");
    }
  }
}

}  // namespace megatron_cpp::step37
