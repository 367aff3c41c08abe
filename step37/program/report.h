// The report of a training run: one self-contained HTML page.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

namespace megatron_cpp::step37 {

/// A picture with its true caption and the caption that the model generated.
struct ReportPicture {
  std::string name;       ///< alternative text
  bool held_out = false;  ///< never trained on
  std::string caption;
  std::string generated;
  std::string thumbnail;  ///< bytes of a PNG file; empty if the picture can't be read: the page says so
};

struct ReportInput {
  std::string title;
  std::vector<std::pair<std::string, std::string>> settings;  ///< key and value, in the order to show
  std::filesystem::path metrics;  ///< metrics.jsonl: step and loss in each line, other values are optional
  std::vector<ReportPicture> pictures;
  int64_t num_parameters = 0;  ///< of the whole model; 0: not shown
  int64_t num_ranks = 0;       ///< 0: not shown
  int64_t total_steps = 0;  ///< of a run that goes on: the page says how far it is, and reloads itself; 0: it has ended
};

/// The page: headline numbers, curves of loss, learning rate and gradient norm, pictures with true and generated
/// captions, settings. It is the static page report.html with the data as JSON, from which its script draws. The page
/// is ASCII, loads nothing from elsewhere, and shows about 1000 steps of a longer run. Not collective: for one rank.
/// @throws c10::ValueError naming file and line if metrics can't be read, a line isn't an object with the numbers
///         `step` and `loss`, or another value is neither a number nor null (not measured).
std::string render_report(const ReportInput& input);

}  // namespace megatron_cpp::step37
