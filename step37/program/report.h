// The report of a training run: one HTML page that needs nothing beside it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace megatron_cpp::step37 {

/// A picture with the caption it has and the caption the model gave it.
struct ReportPicture {
  std::string name;       ///< for those who don't see it
  bool held_out = false;  ///< never trained on
  std::string caption;
  std::string generated;
  std::string thumbnail;  ///< a PNG file's bytes; empty if the picture can't be read, which becomes a note
};

struct ReportInput {
  std::string title;
  std::vector<std::pair<std::string, std::string>> settings;  ///< key and value, in the order to show
  std::filesystem::path metrics;  ///< metrics.jsonl: step and loss in each line, the other values where it has them
  std::vector<ReportPicture> pictures;
  int64_t num_parameters = 0;  ///< of the whole model; this and the following: 0 leaves it out
  int64_t num_ranks = 0;
};

/// The page: headline numbers, curves of loss, learning rate and gradient norm, pictures with true and generated
/// captions, settings. It is the static page report.html, which draws itself from the JSON that this puts into it:
/// ASCII whatever bytes names and captions hold. Nothing is loaded from elsewhere; long runs are thinned to about 1000
/// steps. Not collective: one rank's job.
/// @throws c10::ValueError naming metrics and line: the file can't be read, a line isn't an object with the numbers
///         `step` and `loss`, or has one of the other values as something else than a number (null: not measured).
std::string render_report(const ReportInput& input);

}  // namespace megatron_cpp::step37
