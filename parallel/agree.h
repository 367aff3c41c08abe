// Turns a failure on one rank into an error on every rank.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "parallel/errors.h"
#include "parallel/group.h"

namespace megatron_cpp::parallel {

/// Throws AgreedError on every rank if `ok` is false on any rank. The error has the message of the lowest such rank and
/// says how many ranks failed, unless all did; its exit status is that of this rank. For start-up and data loading,
/// where a check depends on what one rank sees (a file on its host); never inside forward or backward. Collective over
/// `group`: one small all-gather, and two broadcasts after a failure.
void agree(bool ok, const std::string& message, const GroupPtr& group, int exit_status = kErrorStatus);

/// Runs `action`; if it throws anything on any rank, all ranks throw as agree() does. Collective over `group`.
template <class Action>
void agree_on(const Action& action, const GroupPtr& group) {
  bool ok = true;
  std::string message;
  int status = kErrorStatus;
  try {
    action();
  } catch (const std::exception& error) {
    ok = false;
    message = error_text(error);
    status = exit_status(error);
  } catch (...) {
    ok = false;
    message = "what was thrown is no std::exception";
  }
  agree(ok, message, group, status);
}

/// A value that must be the same on every rank.
struct NamedValue {
  std::string name;  ///< its name in messages ("the sequence length")
  int64_t value;     ///< on this rank
};

/// Throws AgreedError on every rank if a value differs between ranks; it names the first such value and the lowest rank
/// where it differs from rank 0. Collective over `group`, with values of the same names: one small all-gather.
void check_equal(const std::vector<NamedValue>& values, const GroupPtr& group);

/// A text that must be the same on every rank.
struct NamedText {
  std::string name;  ///< its name in messages
  std::string text;  ///< on this rank
};

/// The same for texts, which must not contain a 0 character. Collective over `group`, with texts of the same names: two
/// broadcasts and what agree() sends.
void check_equal_texts(const std::vector<NamedText>& texts, const GroupPtr& group);

/// `text` of rank `root`, on every rank. Collective over `group`.
std::string broadcast_text(const std::string& text, int root, const GroupPtr& group);

/// The text of every rank, on every rank. Collective over `group`: two all-gathers.
std::vector<std::string> gather_texts(const std::string& text, const GroupPtr& group);

}  // namespace megatron_cpp::parallel
