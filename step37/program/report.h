// The report of a training run: one HTML page that needs nothing beside it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace step37 {

/// A picture with the caption it has and the caption the model gave it.
struct ReportPicture {
  std::filesystem::path file;  ///< PNG or JPEG; its bytes go into the page as they are
  bool held_out = false;       ///< never trained on
  std::string caption;
  std::string generated;
};

struct ReportInput {
  std::string title;
  std::vector<std::pair<std::string, std::string>> settings;  ///< key and value, in the order to show
  std::filesystem::path metrics;  ///< metrics.jsonl: step and loss in each line, the other values where it has them
  std::vector<ReportPicture> pictures;
  int64_t num_parameters = 0;  ///< of the whole model; this and the following: 0 leaves it out
  int64_t num_ranks = 0;
};

/// The page: headline numbers, curves of loss, learning rate and gradient norm as inline SVG, pictures with true and
/// generated captions, settings. No scripts, nothing loaded from elsewhere; long runs are thinned to about 1000 points
/// a curve. A picture that can't be read becomes a note. Not collective: one rank's job.
/// @throws c10::ValueError naming metrics and line: the file can't be read, a line isn't an object with the numbers
///         `step` and `loss`, or has one of the other values as something else than a number (null: not measured).
std::string render_report(const ReportInput& input);

}  // namespace step37
