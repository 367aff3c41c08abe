// Names, creates, publishes and removes the checkpoint folders of a run.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace megatron_cpp::internal {

/// "step-00000012".
std::string step_name(int64_t step);

/// The folder that a checkpoint is written into before it gets the name `folder`.
std::filesystem::path partial_of(const std::filesystem::path& folder);

/// Removes what a killed run left in `directory`, and makes an empty folder `partial` there.
void prepare_folder(const std::filesystem::path& directory, const std::filesystem::path& partial);

/// Renames `partial` to `folder`. Replaces an existing `folder`, atomically if the file system can exchange two names.
void move_into_place(const std::filesystem::path& partial, const std::filesystem::path& folder);

/// Makes `latest` in `directory` a link to the folder `name`. On a file system without links it removes an old `latest`
/// and warns once.
void point_latest(const std::filesystem::path& directory, const std::filesystem::path& name);

/// Does what a process that was killed after `folder` had got its name left undone: removes unfinished checkpoints
/// beside it, and points `latest` at it. Nothing is written if `latest` leads there, or is `folder` itself (a copied
/// link).
/// @throws WriteError
void finish_killed_save(const std::filesystem::path& folder);

/// Removes checkpoints up to `step`, except the `keep_last` newest. Later ones belong to another run and stay. A
/// failure is only a warning: the new checkpoint is complete.
void remove_old(const std::filesystem::path& directory, int64_t step, int64_t keep_last);

}  // namespace megatron_cpp::internal
