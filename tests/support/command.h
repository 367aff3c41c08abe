// Runs a program as a user does, and examines its output.
#pragma once

#include <string>

namespace megatron_cpp::test_support {

/// `path` in single quotes, for the shell.
std::string quoted(const std::string& path);

struct Outcome {
  int status = -1;     ///< the exit status, -1 if a signal ended it
  std::string output;  ///< stdout and stderr
};

/// Runs a shell command and waits for its end.
Outcome run_command(const std::string& command);

/// The beginning of a command that starts a program on `ranks` ranks.
std::string mpiexec(int ranks);

/// Fails the running test if a process with `mark` in its command line still exists after 5 seconds: mpirun's daemons
/// may take a moment to end their processes.
void expect_no_process_left(const std::string& mark);

/// The number of occurrences of `part` in `text`, without overlaps.
int occurrences(const std::string& text, const std::string& part);

}  // namespace megatron_cpp::test_support
