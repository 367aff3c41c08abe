// What turned out to be wrong with pictures while they were read, told once a run whichever ranks find it.
#pragma once

#include <cstdint>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "parallel/group.h"

namespace megatron_cpp::step37 {

/// Each rank notes what it finds; share() makes it known to all and has it printed once. One object a run and rank.
class PictureFaults {
 public:
  enum class Kind {
    kDamaged,     ///< a part of the picture is missing
    kUnreadable,  ///< a black picture takes its place
    kChanged,     ///< picture or caption file isn't what it was when the folder was searched
  };

  /// @param watch_changes  whether callers should look for kChanged: hosts with copies of the folder have other times.
  explicit PictureFaults(bool watch_changes = false) : watch_changes_(watch_changes) {}

  bool watches_changes() const { return watch_changes_; }

  /// Notes `text`, a sentence, about the picture `path`, unless this rank knows that already. Any thread; not
  /// collective.
  void note(const std::string& path, Kind kind, const std::string& text);

  /// Makes what the ranks have noted since the last call known to all of `group`, and prints it on its rank 0 as
  /// warnings on stderr; of changed files the first only. Collective over `group`: one small all-gather, and a
  /// broadcast for each rank that has noted something.
  void share(const parallel::GroupPtr& group);

  /// As of the last share(), so the same on every rank: how many unreadable pictures there were, and what was said of
  /// the first.
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
  std::mutex mutex_;  ///< of known_ and news_
  std::set<std::pair<std::string, Kind>> known_;
  std::vector<Fault> news_;
  std::set<std::pair<std::string, Kind>> told_;
  int64_t num_unreadable_ = 0;
  std::string first_unreadable_;
  bool any_changed_ = false;
};

}  // namespace megatron_cpp::step37
