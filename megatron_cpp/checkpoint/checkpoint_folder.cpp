#include "megatron_cpp/checkpoint/checkpoint_folder.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <stdio.h>  // renameat2

#include <algorithm>
#include <charconv>
#include <optional>
#include <sstream>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/save_points.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/agree.h"
#include "parallel/errors.h"

namespace megatron_cpp {
namespace internal {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLatest = "latest";
constexpr std::string_view kStepPrefix = "step-";
constexpr std::string_view kPartial = ".partial";

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

/// The folders called step-N, the highest step first. Also `latest`, if it is a folder itself: copying a run's
/// directory may turn the link into a folder, which may be the only checkpoint there.
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
  // Of two of the same step, the one called step-N first.
  std::sort(folders.rbegin(), folders.rend());
  return folders;
}

/// If `latest` is a folder, renames it to the name of its step, or removes it if that name is taken. A folder without a
/// checkpoint stays.
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

/// `path` without separators or "." at its end.
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

/// Whether `path` is what a killed save has left.
bool is_unfinished(const fs::path& path) {
  const auto name = path.filename().string();
  return (name.starts_with(kStepPrefix) || name.starts_with(kLatest)) && name.ends_with(kPartial);
}

void remove_unfinished(const fs::path& directory) {
  std::vector<fs::path> unfinished;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (is_unfinished(entry.path())) unfinished.push_back(entry.path());
  }
  for (const auto& path : unfinished) fs::remove_all(path);
}

}  // namespace

std::string step_name(int64_t step) { return fmt::format("{}{:08}", kStepPrefix, step); }

fs::path partial_of(const fs::path& folder) { return folder.string() + std::string(kPartial); }

void prepare_folder(const fs::path& directory, const fs::path& partial) {
  fs::create_directories(directory);
  remove_unfinished(directory);
  fs::create_directory(partial);
}

void move_into_place(const fs::path& partial, const fs::path& folder) {
  if (!fs::exists(folder)) {
    fs::rename(partial, folder);
  } else if (::renameat2(AT_FDCWD, partial.c_str(), AT_FDCWD, folder.c_str(), RENAME_EXCHANGE) == 0) {
    fs::remove_all(partial);
  } else {
    const fs::path replaced = partial_of(folder.string() + ".replaced");
    fs::rename(folder, replaced);
    fs::rename(partial, folder);
    fs::remove_all(replaced);
  }
}

void point_latest(const fs::path& directory, const fs::path& name) {
  const auto latest = directory / kLatest;
  if (!clear_latest_folder(latest)) return;
  const auto link = directory / (kLatest + std::string(kPartial));
  std::error_code error;
  std::error_code ignored;
  fs::create_directory_symlink(name, link, error);
  save_point("latest_moving");
  if (!error) fs::rename(link, latest, error);
  if (internal::means_lost_data(error.value())) {
    throw WriteError(fmt::format("cannot make the link {}: {}", latest.string(), error.message()));
  }
  if (error) {
    fs::remove(link, ignored);
    fs::remove(latest, ignored);
    TORCH_WARN_ONCE("cannot make the link ", latest.string(), ": ", error.message(),
                    "; readers look for the highest step");
    return;
  }
  flush_folder(directory);
  save_point("latest_moved");
}

void finish_killed_save(const fs::path& folder) {
  const auto directory = folder.parent_path();
  remove_unfinished(directory);
  std::error_code not_there;
  if (!fs::equivalent(directory / kLatest, folder, not_there)) point_latest(directory, folder.filename());
}

void remove_old(const fs::path& directory, int64_t step, int64_t keep_last) {
  try {
    int64_t num_kept = 0;
    for (const auto& [found, folder] : step_folders(directory)) {
      if (folder.filename() == kLatest || found > step || num_kept++ < keep_last) continue;
      const fs::path doomed = partial_of(folder);
      std::error_code error;
      fs::rename(folder, doomed, error);  // half removed, it must not be called step-N
      save_point("old_removing");
      if (!error) fs::remove_all(doomed, error);
      if (error) {
        TORCH_WARN("cannot remove the old checkpoint ", folder.string(), ": ", error.message());
      }
    }
  } catch (const std::exception& error) {
    TORCH_WARN("cannot remove old checkpoints in ", directory.string(), ": ", parallel::error_text(error));
  }
}

}  // namespace internal

using internal::is_own_folder;
using internal::kLatest;
using internal::kManifestFile;
namespace fs = std::filesystem;

fs::path find_checkpoint(const fs::path& given) {
  const auto path = internal::without_ending(given);
  std::error_code not_there;
  const bool is_latest = path.filename() == kLatest;
  if (!is_latest && fs::is_regular_file(path / kManifestFile, not_there)) return fs::canonical(path);
  const auto directory = is_latest ? (path.has_parent_path() ? path.parent_path() : fs::path(".")) : path;
  const auto latest = directory / kLatest;
  const auto step = internal::step_of_latest(latest);
  const auto folders = internal::step_folders(directory);
  // A link names the newest checkpoint; a folder is a copy of a link and may be out of date.
  const bool is_newest = !is_own_folder(latest) || folders.empty() || *step >= folders.front().first;
  if (step && is_newest) return fs::canonical(latest);
  TORCH_CHECK_VALUE(!folders.empty(), path.string(), " is no checkpoint: neither ", kManifestFile, " nor ", kLatest,
                    "/", kManifestFile, " is there");
  const auto newest = latest_checkpoint(directory);
  const auto why = step ? fmt::format(" is of step {}; taking ", *step) : std::string(" is not there; taking ");
  TORCH_WARN(latest.string(), why, newest->string());
  return fs::canonical(*newest);
}

void remove_checkpoints(const fs::path& directory) {
  std::error_code not_there;
  if (!fs::is_directory(directory, not_there)) return;
  std::vector<fs::path> ours;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const auto name = entry.path().filename().string();
    const bool is_ours = internal::step_of(entry.path()) || name == kLatest || internal::is_unfinished(entry.path());
    if (is_ours) ours.push_back(entry.path());
  }
  for (const auto& path : ours) fs::remove_all(path);
}

std::optional<fs::path> latest_checkpoint(const fs::path& directory) {
  const auto folders = internal::step_folders(directory);
  std::string reason;
  for (const auto& [step, folder] : folders) {
    try {
      for (const auto& [name, digest] : internal::read_manifest(folder).files) {
        internal::check_size(folder / name, digest.bytes);
      }
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

CheckpointSearch find_whole_checkpoint(const fs::path& directory, const parallel::GroupPtr& world) {
  std::string names;
  parallel::agree_on(
      [&] {
        if (world->getRank() != 0) return;
        for (const auto& [step, folder] : internal::step_folders(directory)) names += folder.filename().string() + "\n";
      },
      world);
  std::istringstream lines(parallel::broadcast_text(names, 0, world));
  CheckpointSearch search;
  for (std::string name; !search.whole && std::getline(lines, name);) {
    try {
      verify_checkpoint(directory / name, world);
      search.whole = directory / name;
    } catch (const parallel::AgreedError& error) {
      search.damaged.push_back(parallel::error_text(error));
    }
  }
  const bool is_lost = !search.whole && !search.damaged.empty();
  parallel::agree(!is_lost,
                  fmt::format("none of the {} checkpoints in {} can be read; the last one looked at: {}",
                              search.damaged.size(), directory.string(), is_lost ? search.damaged.back() : ""),
                  world);
  return search;
}

}  // namespace megatron_cpp
