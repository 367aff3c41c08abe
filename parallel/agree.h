// Turning what one rank finds into an error on every rank.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "parallel/errors.h"
#include "parallel/group.h"

namespace megatron_cpp::parallel {

/// Throws AgreedError on every rank if `ok` is false on any: with the message of the lowest rank that isn't ok, and how
/// many ranks weren't. For start-up and data loading, where a check depends on what one rank sees (a file on its host);
/// never inside forward or backward. Collective over `group`: one small all-gather, and when something is wrong two
/// broadcasts.
void agree(bool ok, const std::string& message, const GroupPtr& group);

/// Runs `action` on every rank; if it throws anything on any, all throw as agree() does.
template <class Action>
void agree_on(const Action& action, const GroupPtr& group) {
  bool ok = true;
  std::string message;
  try {
    action();
  } catch (const std::exception& error) {
    ok = false;
    message = error_text(error);
  } catch (...) {
    ok = false;
    message = "what was thrown is no std::exception";
  }
  agree(ok, message, group);
}

/// A value that must be the same on every rank.
struct NamedValue {
  std::string name;  ///< how messages call it ("the sequence length")
  int64_t value;     ///< this rank's
};

/// Throws AgreedError on every rank, naming the first value that differs and the lowest rank that has another than rank
/// 0, if any does. Collective over `group`, with values of the same names: one small all-gather.
void check_equal(const std::vector<NamedValue>& values, const GroupPtr& group);

/// A text that must be the same on every rank.
struct NamedText {
  std::string name;  ///< what messages call it
  std::string text;  ///< this rank's
};

/// The same for texts, none of which holds a 0 character. Collective over `group`, with texts of the same names: two
/// broadcasts and what agree() sends.
void check_equal_texts(const std::vector<NamedText>& texts, const GroupPtr& group);

/// `text` of rank `root`, on every rank. Collective over `group`.
std::string broadcast_text(const std::string& text, int root, const GroupPtr& group);

}  // namespace megatron_cpp::parallel
