#include "parallel/errors.h"

#include <c10/util/Exception.h>

namespace megatron_cpp::parallel {

std::string error_text(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

}  // namespace megatron_cpp::parallel
