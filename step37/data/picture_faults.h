// Collects what is wrong with pictures that the ranks read, and prints each fault once per run.
#pragma once

#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::step37 {

/// Each rank notes what it finds; share() tells all ranks and prints it once. One object per run and rank.
class PictureFaults {
 public:
  enum class Kind {
    kDamaged,     ///< a part of the picture is missing
    kUnreadable,  ///< a black picture replaces it
    kChanged,     ///< picture or caption file changed after the folder was searched
  };

  /// @param watch_changes  whether callers should look for kChanged: copies of the folder have other times.
  explicit PictureFaults(bool watch_changes = false) : watch_changes_(watch_changes) {}

  bool watches_changes() const { return watch_changes_; }

  /// Notes `text`, a sentence, about the picture `path`, once per path and kind. Thread-safe; not collective.
  void note(const std::string& path, Kind kind, const std::string& text);

  /// Sends what the ranks noted since the last call to all ranks of `group`. Rank 0 prints it as warnings on stderr; of
  /// changed files only the first. Collective over `group`: one small all-gather, and one broadcast for each rank that
  /// has noted something.
  void share(const parallel::GroupPtr& group);

  /// As of the last share(), so equal on every rank: the number of unreadable pictures, and the text about the first.
  int64_t num_unreadable() const { return num_unreadable_; }
  const std::string& first_unreadable() const { return first_unreadable_; }
  /// Whether a file has changed.
  bool any_changed() const { return any_changed_; }

 private:
  struct Fault {
    std::string path;
    Kind kind;
    std::string text;
  };

  std::string take_news();
  void learn(const std::string& news, bool print);

  bool watch_changes_;
  std::mutex mutex_;  ///< protects known_ and news_
  std::set<std::pair<std::string, Kind>> known_;
  std::vector<Fault> news_;
  std::set<std::pair<std::string, Kind>> told_;
  int64_t num_unreadable_ = 0;
  std::string first_unreadable_;
  bool any_changed_ = false;
};

}  // namespace megatron_cpp::step37
