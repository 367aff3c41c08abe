// Checks the errors and warnings of an action.
#pragma once

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "parallel/agree.h"

namespace megatron_cpp::test_support {

/// The text of the Error that `action` throws; "nothing thrown" if it returns.
template <class Error, class Action>
std::string error_of(const Action& action) {
  try {
    action();
  } catch (const Error& error) {
    return parallel::error_text(error);
  }
  return "nothing thrown";
}

/// The text of the c10::ValueError that `action` throws; "nothing thrown" if it returns.
template <class Action>
std::string value_error(const Action& action) {
  return error_of<c10::ValueError>(action);
}

/// Whether `text` contains `part`.
inline testing::AssertionResult contains(std::string_view text, std::string_view part) {
  if (text.find(part) != std::string_view::npos) return testing::AssertionSuccess() << text << "\n  has: " << part;
  return testing::AssertionFailure() << text << "\n  lacks: " << part;
}

/// Whether `action` throws an Error whose text contains `part`.
template <class Error = c10::ValueError, class Action>
testing::AssertionResult throws(const Action& action, const std::string& part) {
  std::string text = "nothing thrown";
  try {
    action();
  } catch (const Error& error) {
    text = parallel::error_text(error);
    if (text.find(part) != std::string::npos) return testing::AssertionSuccess();
  } catch (const std::exception& error) {
    text = std::string("another exception: ") + error.what();
  }
  return testing::AssertionFailure() << text << "\n  instead of: " << part;
}

/// Collects warnings while it lives, instead of printing them.
class Warnings : public c10::WarningHandler {
 public:
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
  std::vector<std::string> texts;

 private:
  c10::WarningUtils::WarningHandlerGuard guard_{this};
};

}  // namespace megatron_cpp::test_support
