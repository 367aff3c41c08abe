// A trace of some training steps by PyTorch's profiler (Kineto).
#pragma once

#include <c10/core/Device.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace megatron_cpp {

/// Steps of a run, counted from 1, the last one included.
struct StepRange {
  int64_t first = 0;  ///< 0: none
  int64_t last = 0;   ///< 0: none

  /// Whether `step` is one of them.
  bool contains(int64_t step) const { return first > 0 && first <= step && step <= last; }
  bool operator==(const StepRange&) const = default;
};

/// What a thread recorded: operators of LibTorch in forward and backward, parallel::NamedRange, and what a GPU ran.
struct ProfiledEvent {
  std::string name;         ///< such as aten::mm, or the range's
  bool is_range = false;    ///< a NamedRange
  uint64_t thread = 0;      ///< tells threads apart
  int64_t begin = 0;        ///< in nanoseconds
  int64_t nanoseconds = 0;  ///< how long it took, with what it called
};

/// Records steps of a training loop (TrainingLoopOptions::profile) on the thread that runs it, and on the threads of
/// its backward pass. One object at a time may record in a process.
///
/// The trace is a JSON file that https://ui.perfetto.dev and chrome://tracing open. Named ranges (parallel::NamedRange)
/// are in it beside LibTorch's operators: data, forward, backward, gradient reduction, norm and clipping, optimizer;
/// the parts of a layer; plan, projection and exchange of an image insert; each collective with its group and size.
/// What runs in a backward pass has the names of autograd's nodes.
class StepProfile {
 public:
  /// Nothing is recorded yet. Not collective.
  /// @param file    is made, or replaced, after the last step of the range; empty: no file.
  /// @param device  that the model computes on: of a GPU its kernels are recorded, too.
  StepProfile(StepRange steps, std::filesystem::path file, c10::Device device);
  /// Ends a recording, without a file.
  ~StepProfile();
  StepProfile(const StepProfile&) = delete;
  StepProfile& operator=(const StepProfile&) = delete;

  /// Begins to record if this is a step of the range. Not collective.
  void begin_step(int64_t step);
  /// Ends the recording after the range's last step, and writes the file. Not collective.
  /// @return  whether it did.
  /// @throws WriteError if the file can't be written.
  bool end_step(int64_t step);
  /// Ends a recording before the range's last step, as after a signal; writes what there is. As end_step.
  bool finish();

  /// What was recorded, in the order of their beginnings, after the end; a parent before what it called.
  const std::vector<ProfiledEvent>& events() const { return events_; }

 private:
  StepRange steps_;
  std::filesystem::path file_;
  c10::Device device_;
  bool is_recording_ = false;
  std::vector<ProfiledEvent> events_;
};

}  // namespace megatron_cpp
