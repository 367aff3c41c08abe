// Named moments of a save, at which tests kill the process.
#pragma once

#include <array>
#include <functional>
#include <string_view>

namespace megatron_cpp::internal {

/// The moments of a save, in their order.
inline constexpr std::array<std::string_view, 11> kSavePoints = {
    "copied",         ///< the values that this rank writes are known; the folder step-N.partial is there
    "file_open",      ///< the header of this rank's file is written, under a temporary name
    "half_written",   ///< and half of its tensors
    "written",        ///< all of it, not flushed
    "file_renamed",   ///< this rank's file has its name
    "files_written",  ///< all ranks have agreed that their files have; from here on, rank 0
    "manifest_written",
    "folder_renamed",  ///< the folder is called step-N
    "latest_moving",   ///< the new link is made beside `latest`
    "latest_moved",    ///< `latest` names step-N
    "old_removing",    ///< an old checkpoint has lost its name and not its files; once for each
};

/// Called at each of kSavePoints, by the thread that saves. Does nothing but in tests: calls the hook, and kills this
/// process (SIGKILL) if the environment variable MCPP_KILL_AT_SAVE_POINT, read once, is the point's name, or name:n and
/// this is the n-th time.
/// @throws c10::ValueError if the variable is neither.
void save_point(std::string_view name);

/// What save_point() calls first; empty: nothing. Only while nothing is being saved.
void set_save_point_hook(std::function<void(std::string_view)> hook);

}  // namespace megatron_cpp::internal
