#include "parallel/errors.h"

#include <c10/util/Exception.h>

#include <filesystem>

namespace megatron_cpp::parallel {

std::string error_text(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

int exit_status(const std::exception& error) {
  if (const auto* with_status = dynamic_cast<const ExitError*>(&error)) return with_status->exit_status();
  return dynamic_cast<const std::filesystem::filesystem_error*>(&error) != nullptr ? kCannotWriteStatus : kErrorStatus;
}

}  // namespace megatron_cpp::parallel
