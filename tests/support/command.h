// Starting a program as a user does, and looking at what it says.
#pragma once

#include <string>

namespace megatron_cpp::test_support {

/// `path` for the shell.
std::string quoted(const std::string& path);

struct Outcome {
  int status = -1;     ///< the exit status, -1 if it was ended by a signal
  std::string output;  ///< stdout and stderr
};

/// Runs a command of the shell and waits for its end.
Outcome run_command(const std::string& command);

/// How a program is started on `ranks` ranks: put this in front of it.
std::string mpiexec(int ranks);

/// Fails the running test if a process with `mark` among its arguments is still there in 5 seconds: mpirun's daemons
/// may take a moment to end what they started.
void expect_no_process_left(const std::string& mark);

/// How often `part` is in `text`, without overlaps.
int occurrences(const std::string& text, const std::string& part);

}  // namespace megatron_cpp::test_support
