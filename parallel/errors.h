// Errors of ranks.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

namespace megatron_cpp::parallel {

/// An error that every rank of a group throws together, with the same text (agree.h).
class AgreedError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// What `error` says, without LibTorch's stack trace.
std::string error_text(const std::exception& error);

}  // namespace megatron_cpp::parallel
