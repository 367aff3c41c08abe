#include "step37/program/report.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <string_view>

#include "step37/program/report_template.h"  // report.html, made into a string by CMake

namespace megatron_cpp::step37 {
namespace {

using Json = nlohmann::json;

std::string base64(std::string_view bytes) {
  constexpr char kLetters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string result;
  result.reserve((bytes.size() + 2) / 3 * 4);
  for (size_t begin = 0; begin < bytes.size(); begin += 3) {
    const auto part = bytes.substr(begin, 3);
    uint32_t bits = 0;
    for (size_t i = 0; i < 3; ++i) bits = bits << 8U | (i < part.size() ? static_cast<unsigned char>(part[i]) : 0U);
    for (size_t i = 0; i < 4; ++i) result += i <= part.size() ? kLetters[bits >> (18U - 6U * i) & 63U] : '=';
  }
  return result;
}

constexpr const char* kNumbers[] = {"loss",           "grad_norm",         "learning_rate",   "tokens",
                                    "images",         "tokens_per_second", "tflops_per_rank", "peak_share",
                                    "validation_loss"};

/// Reads `step` and those of kNumbers that are there from a line of metrics.jsonl.
Json parse_step(const std::string& line, const std::string& where) {
  const auto object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(object.is_object(), where, ": not a JSON object: ", line.substr(0, 80));
  const auto step = object.find("step");
  TORCH_CHECK_VALUE(step != object.end() && step->is_number_integer(), where, ": no integer `step`");
  Json result{{"step", *step}};
  for (const char* name : kNumbers) {
    const auto found = object.find(name);
    if (found == object.end() || found->is_null()) continue;
    TORCH_CHECK_VALUE(found->is_number(), where, ": ", name, " is ", found->dump(), ", expected a number");
    result[name] = *found;
  }
  TORCH_CHECK_VALUE(object.contains("loss"), where, ": no number `loss`");
  return result;
}

/// The steps, without those that were skipped because their loss isn't finite, which JSON writes as null.
std::vector<Json> read_metrics(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<Json> steps;
  int64_t number = 0;
  for (std::string line; file && std::getline(file, line);) {
    const auto where = fmt::format("{}:{}", path.string(), ++number);
    auto step = parse_step(line, where);
    if (!step.contains("loss")) continue;
    TORCH_CHECK_VALUE(steps.empty() || step.at("step") > steps.back().at("step"), where, ": step ",
                      step.at("step").dump(), " after step ", steps.back().at("step").dump());
    steps.push_back(std::move(step));
  }
  TORCH_CHECK_VALUE(file.is_open() && !file.bad(), "can't read the metrics ", path.string(), ": ",
                    std::strerror(errno));
  return steps;
}

std::vector<double> values_of(const std::vector<Json>& steps, const char* name) {
  std::vector<double> values;
  for (const auto& step : steps) {
    if (step.contains(name)) values.push_back(step.at(name).get<double>());
  }
  return values;
}

/// Sums over all steps, and medians of the speed; values that were never measured are left out.
Json totals_of(const std::vector<Json>& steps) {
  Json totals = Json::object();
  for (const char* name : {"tokens", "images"}) {
    const auto values = values_of(steps, name);
    if (!values.empty()) totals[name] = std::accumulate(values.begin(), values.end(), 0.0);
  }
  for (const char* name : {"tokens_per_second", "tflops_per_rank", "peak_share"}) {
    auto values = values_of(steps, name);
    if (values.empty()) continue;
    const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
    std::nth_element(values.begin(), middle, values.end());
    totals[name] = *middle;
  }
  return totals;
}

/// Adds `mean_loss` to each step: the mean over a window of up to a twentieth of the run, centred at the step; narrower
/// at the beginning of the run, where the curve is steep, and one-sided at its end.
void add_mean_loss(std::vector<Json>& steps) {
  std::vector<double> sums{0.0};
  for (const double loss : values_of(steps, "loss")) sums.push_back(sums.back() + loss);
  for (size_t i = 0; i < steps.size(); ++i) {
    const size_t before = std::min(i, steps.size() / 40);
    const size_t after = std::min(before, steps.size() - 1 - i);
    steps[i]["mean_loss"] = (sums[i + after + 1] - sums[i - before]) / static_cast<double>(before + 1 + after);
  }
}

/// Keeps about 1000 steps at most: the first, the last, and of each stretch those with the lowest and highest loss, so
/// that spikes stay, and with the lowest validation loss.
std::vector<Json> thinned(std::vector<Json> steps) {
  constexpr size_t kStretches = 330;
  if (steps.size() <= 3 * kStretches) return steps;
  std::vector<bool> kept(steps.size(), false);
  kept.front() = kept.back() = true;
  for (size_t stretch = 0; stretch < kStretches; ++stretch) {
    const auto at = [&](size_t n) {
      return steps.begin() + static_cast<std::ptrdiff_t>(steps.size() * n / kStretches);
    };
    const auto less = [](const char* name) {
      return [name](const Json& a, const Json& b) {
        constexpr double kMost = std::numeric_limits<double>::max();
        return a.value(name, kMost) < b.value(name, kMost);
      };
    };
    const auto [lowest, highest] = std::minmax_element(at(stretch), at(stretch + 1), less("loss"));
    const auto best = std::min_element(at(stretch), at(stretch + 1), less("validation_loss"));
    for (const auto& chosen : {lowest, highest, best}) {
      if (chosen != best || best->contains("validation_loss")) kept[static_cast<size_t>(chosen - steps.begin())] = true;
    }
  }
  // The last measured validation loss is a headline.
  for (size_t i = steps.size(); i-- > 0;) {
    if (!steps[i].contains("validation_loss")) continue;
    kept[i] = true;
    break;
  }
  std::vector<Json> result;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (kept[i]) result.push_back(std::move(steps[i]));
  }
  return result;
}

}  // namespace

std::string render_report(const ReportInput& input) {
  auto steps = read_metrics(input.metrics);
  Json run{{"title", input.title},       {"settings", input.settings},
           {"totals", totals_of(steps)}, {"parameters", input.num_parameters},
           {"ranks", input.num_ranks},   {"total_steps", input.total_steps},
           {"pictures", Json::array()}};
  add_mean_loss(steps);
  run["steps"] = thinned(std::move(steps));
  for (const auto& picture : input.pictures) {
    run["pictures"].push_back({{"name", picture.name},
                               {"held_out", picture.held_out},
                               {"caption", picture.caption},
                               {"generated", picture.generated},
                               {"thumbnail", base64(picture.thumbnail)}});
  }
  // The JSON has no '<', so that nothing in it can end the <script> element.
  std::string html(kReportTemplate);
  constexpr std::string_view kPlace = "{{RUN}}";
  std::string data;
  for (const char letter : run.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace)) {
    data += letter == '<' ? "\\u003c" : std::string(1, letter);
  }
  return html.replace(html.find(kPlace), kPlace.size(), data);
}

}  // namespace megatron_cpp::step37
