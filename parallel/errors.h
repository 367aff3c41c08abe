// Errors of ranks.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

namespace megatron_cpp::parallel {

// Exit statuses of a program, from sysexits.h where it has a fitting one. docs/training.md says what each tells a
// launcher.
inline constexpr int kErrorStatus = 1;           ///< an error that would occur again
inline constexpr int kNotFiniteStatus = 65;      ///< data or model give NaN or infinity (EX_DATAERR)
inline constexpr int kSuspectedHostStatus = 71;  ///< a host computes wrongly: try another one (EX_OSERR)
inline constexpr int kCannotWriteStatus = 74;    ///< files can't be written (EX_IOERR)
inline constexpr int kInterruptedStatus = 75;    ///< what is done is saved, and the rest can follow later (EX_TEMPFAIL)

/// An error with an exit status of its own.
class ExitError : public std::runtime_error {
 public:
  /// @param exit_status  that Runtime::run() returns if nobody catches the error.
  explicit ExitError(const std::string& text, int exit_status = kErrorStatus)
      : std::runtime_error(text), exit_status_(exit_status) {}
  /// Not 0.
  int exit_status() const { return exit_status_; }

 private:
  int exit_status_;
};

/// An error that every rank of a group throws together, with the same text (agree.h).
class AgreedError : public ExitError {
 public:
  using ExitError::ExitError;
};

/// ExitError::exit_status() of `error`; of a std::filesystem::filesystem_error kCannotWriteStatus, else kErrorStatus.
int exit_status(const std::exception& error);

/// What `error` says, without LibTorch's stack trace.
std::string error_text(const std::exception& error);

}  // namespace megatron_cpp::parallel
