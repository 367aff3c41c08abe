// Turning what one rank finds into an error on every rank.
#pragma once

#include <stdexcept>
#include <string>

#include "parallel/group.h"

namespace parallel {

/// An error that every rank of a group throws together, with the same text.
class AgreedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What `error` says, without LibTorch's stack trace.
std::string error_text(const std::exception& error);

/// Throws AgreedError on every rank if `ok` is false on any: with the message of the lowest rank that isn't ok, and how
/// many ranks weren't. For start-up and data loading, where a check depends on what one rank sees (a file on its host);
/// never inside forward or backward. Collective over `group`: one small all-gather, two when something is wrong.
void agree(bool ok, const std::string& message, const GroupPtr& group);

/// Runs `action` on every rank; if it throws on any, all throw as agree() does.
template <class Action>
void agree_on(const Action& action, const GroupPtr& group) {
  bool ok = true;
  std::string message;
  try {
    action();
  } catch (const std::exception& error) {
    ok = false;
    message = error_text(error);
  }
  agree(ok, message, group);
}

/// `text` of rank `root`, on every rank. Collective over `group`.
std::string broadcast_text(const std::string& text, int root, const GroupPtr& group);

}  // namespace parallel
