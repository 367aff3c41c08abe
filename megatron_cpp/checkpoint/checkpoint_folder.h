// The folders of a run's checkpoints: their names, and how one appears, becomes the latest, and goes.
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

/// Renames `partial` to `folder`. A folder that had this name goes: at one stroke where the file system can exchange
/// two names.
void move_into_place(const std::filesystem::path& partial, const std::filesystem::path& folder);

/// Makes `latest` in `directory` a link to the folder `name`. A file system may have no links: then there is no
/// `latest`, rather than an old one, and one warning.
void point_latest(const std::filesystem::path& directory, const std::filesystem::path& name);

/// Removes checkpoints up to `step` but the `keep_last` newest. Later ones are of a run that this one didn't start
/// from. What goes wrong is a warning: the other ranks are through, and the new checkpoint is what counts.
void remove_old(const std::filesystem::path& directory, int64_t step, int64_t keep_last);

}  // namespace megatron_cpp::internal
