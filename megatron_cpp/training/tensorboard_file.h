// TensorBoard event files: a run's metrics for https://www.tensorflow.org/tensorboard.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/training/training_loop.h"

namespace megatron_cpp {

/// Appends the numbers of each step to an event file of its own, as the file formats of TensorBoard have it: records of
/// TFRecord (tensorflow/core/lib/io/record_writer.cc: length and data, each with a masked CRC-32C), each a message
/// Event (tensorboard/compat/proto/event.proto) with one Summary value a number. One rank of a run writes it.
///
/// Each start of a run has a file. Its second event says at which step the run goes on, so that TensorBoard passes over
/// what earlier files have of later steps.
class TensorBoardFile {
 public:
  /// Creates FOLDER/events.out.tfevents.SECONDS.HOST.PROCESS.
  /// @param last_step  the run goes on after it
  /// @throws WriteError naming the file and the system's reason.
  TensorBoardFile(const std::filesystem::path& folder, int64_t last_step);

  /// Appends what MetricsFile writes of a step, under the same names, as float32.
  /// @throws WriteError naming the file and the system's reason. Nothing of the step is in the file then.
  void write(const StepMetrics& metrics);

 private:
  void write_event(std::string_view event);

  internal::AppendedFile file_;
};

}  // namespace megatron_cpp
