#include "step37/program/report.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <string_view>

#include "step37/program/report_style.h"

namespace step37 {
namespace {

constexpr size_t kMaxPoints = 1000;  // of a curve
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Text and numbers for the page.

std::string escaped(std::string_view text) {
  std::string result;
  for (const char c : text) {
    switch (c) {
      case '&':
        result += "&amp;";
        break;
      case '<':
        result += "&lt;";
        break;
      case '>':
        result += "&gt;";
        break;
      case '"':
        result += "&quot;";
        break;
      case '\'':
        result += "&#39;";
        break;
      default:
        result += c;
    }
  }
  return result;
}

std::string digits(double value, std::chars_format format, int precision) {
  std::array<char, 64> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value, format, precision).ptr;
  return {buffer.data(), end};
}
std::string significant(double value, int precision) { return digits(value, std::chars_format::general, precision); }
std::string position(double value) { return digits(value, std::chars_format::fixed, 1); }
std::string loss_text(double value) { return digits(value, std::chars_format::fixed, 3); }

/// 1234567 as 1,234,567.
std::string grouped(int64_t value) {
  const auto plain = std::to_string(value);
  const size_t sign = value < 0 ? 1 : 0;
  auto text = plain.substr(0, sign);
  for (size_t i = sign; i < plain.size(); ++i) {
    if (i > sign && (plain.size() - i) % 3 == 0) text += ',';
    text += plain[i];
  }
  return text;
}

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

/// A file's bytes; nothing if it can't be read (errno says why).
std::optional<std::string> read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream bytes;
  if (file.peek() != std::ifstream::traits_type::eof()) bytes << file.rdbuf();
  if (!file.is_open() || file.bad()) return std::nullopt;
  return bytes.str();
}

// metrics.jsonl

struct Step {
  int64_t step = 0;
  double loss = 0.0;
  std::optional<double> grad_norm;
  std::optional<double> learning_rate;
  std::optional<double> tokens;
  std::optional<double> images;
  std::optional<double> tokens_per_second;
  std::optional<double> validation_loss;
};

std::optional<double> number_in(const nlohmann::json& object, const char* name, const std::string& where) {
  const auto found = object.find(name);
  if (found == object.end() || found->is_null()) return std::nullopt;
  TORCH_CHECK_VALUE(found->is_number(), where, ": ", name, " is ", found->dump(), ", expected a number");
  return found->get<double>();
}

Step parse_step(const std::string& line, const std::string& where) {
  const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(object.is_object(), where, ": not a JSON object: ", line.substr(0, 80));
  const auto number = [&](const char* name) { return number_in(object, name, where); };
  const auto step = object.find("step");
  TORCH_CHECK_VALUE(step != object.end() && step->is_number_integer(), where, ": no integer `step`");
  const auto loss = number("loss");
  TORCH_CHECK_VALUE(loss.has_value(), where, ": no number `loss`");
  return {.step = step->get<int64_t>(),
          .loss = *loss,
          .grad_norm = number("grad_norm"),
          .learning_rate = number("learning_rate"),
          .tokens = number("tokens"),
          .images = number("images"),
          .tokens_per_second = number("tokens_per_second"),
          .validation_loss = number("validation_loss")};
}

std::vector<Step> read_metrics(const std::filesystem::path& path) {
  const auto text = read_bytes(path);
  TORCH_CHECK_VALUE(text.has_value(), "can't read the metrics ", path.string(), ": ", std::strerror(errno));
  std::istringstream lines(*text);
  std::vector<Step> steps;
  std::string line;
  while (std::getline(lines, line)) {
    const auto where = path.string() + ":" + std::to_string(steps.size() + 1);
    const auto step = parse_step(line, where);
    TORCH_CHECK_VALUE(steps.empty() || step.step > steps.back().step, where, ": step ", step.step, " after step ",
                      steps.back().step);
    steps.push_back(step);
  }
  return steps;
}

// Curves

struct Point {
  double x;
  double y;
};
using Curve = std::vector<Point>;

/// The values of one member, where they were measured.
template <class Value>
Curve curve_of(const std::vector<Step>& steps, const Value& value) {
  Curve curve;
  for (const auto& step : steps) {
    const std::optional<double> y = value(step);
    if (y) curve.push_back({static_cast<double>(step.step), *y});
  }
  return curve;
}

/// At most kMaxPoints points: of each stretch the lowest and the highest, so that spikes stay; the ends too.
Curve thinned(const Curve& curve) {
  if (curve.size() <= kMaxPoints) return curve;
  constexpr size_t kStretches = kMaxPoints / 2 - 1;
  const size_t inner = curve.size() - 2;
  Curve result{curve.front()};
  for (size_t stretch = 0; stretch < kStretches; ++stretch) {
    const auto at = [&](size_t n) { return curve.begin() + static_cast<std::ptrdiff_t>(1 + inner * n / kStretches); };
    auto [first, second] =
        std::minmax_element(at(stretch), at(stretch + 1), [](const Point& a, const Point& b) { return a.y < b.y; });
    if (second < first) std::swap(first, second);
    result.push_back(*first);
    if (second != first) result.push_back(*second);
  }
  result.push_back(curve.back());
  return result;
}

/// Means over windows of up to a twentieth of the curve, centred at each point; narrower where the curve begins,
/// because it is steep there, and one-sided where it ends.
Curve smoothed(const Curve& curve) {
  std::vector<double> sums{0.0};
  for (const auto& point : curve) sums.push_back(sums.back() + point.y);
  Curve result = curve;
  for (size_t i = 0; i < curve.size(); ++i) {
    const size_t before = std::min(i, curve.size() / 40);
    const size_t after = std::min(before, curve.size() - 1 - i);
    result[i].y = (sums[i + after + 1] - sums[i - before]) / static_cast<double>(before + 1 + after);
  }
  return result;
}

/// An axis from `low` to `high` with a tick at every multiple of `step` in between.
struct Axis {
  double low = 0.0;
  double high = 1.0;
  double step = 1.0;

  double share(double value) const { return (value - low) / (high - low); }
  std::vector<double> ticks() const {
    std::vector<double> result;
    const auto first = std::llround(std::ceil(low / step - 1e-9));
    const auto last = std::llround(std::floor(high / step + 1e-9));
    for (auto n = first; n <= last; ++n) result.push_back(static_cast<double>(n) * step);
    return result;
  }
};

/// 1, 2 or 5 times a power of ten, so that `length` has at most `max_ticks` of it.
double round_step(double length, int max_ticks) {
  const double least = length / max_ticks;
  const double power = std::pow(10.0, std::floor(std::log10(least)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= least * (1 - 1e-9)) return factor * power;
  }
  return 10.0 * power;
}

Axis step_axis(double first, double last) {
  Axis axis{first, last > first ? last : first + 1.0, 1.0};
  axis.step = std::max(1.0, round_step(axis.high - axis.low, 6));
  return axis;
}

/// From a tick below the lowest to a tick above the highest value.
Axis value_axis(const std::vector<const Curve*>& curves, bool from_zero, int max_ticks) {
  double low = from_zero ? 0.0 : kInfinity;
  double high = -kInfinity;
  for (const auto* curve : curves) {
    for (const auto& point : *curve) {
      low = std::min(low, point.y);
      high = std::max(high, point.y);
    }
  }
  if (!(high > low)) high = low + std::max(std::abs(low), 1.0);
  const double step = round_step(high - low, max_ticks);
  return {std::floor(low / step + 1e-9) * step, std::ceil(high / step - 1e-9) * step, step};
}

std::string tick_text(double value) {
  if (std::abs(value) >= 10000.0) return significant(value / 1000.0, 6) + "k";
  return significant(std::abs(value) < 1e-12 ? 0.0 : value, 6);
}

/// A drawing: lines, dots on top, and what the axes say.
struct Chart {
  std::string label;  ///< for readers who don't see it
  int height = 280;   ///< of the plot, in pixels; its width is the page's
  bool from_zero = false;
  std::vector<std::pair<std::string, Curve>> lines;  ///< CSS class and points
  Curve dots;
};

std::string render_axes(const Axis& x, const Axis& y, int height) {
  std::string svg;
  const auto bottom = std::to_string(height);
  for (const double tick : y.ticks()) {
    const auto place = position(height * (1.0 - y.share(tick)));
    svg += "<line class=\"grid\" x2=\"100%\" y1=\"" + place + "\" y2=\"" + place + "\"/>";
    svg += "<text class=\"y\" x=\"-8\" y=\"" + place + "\" dy=\".32em\">" + tick_text(tick) + "</text>\n";
  }
  for (const double tick : x.ticks()) {
    const auto place = position(100.0 * x.share(tick)) + "%";
    svg += "<line class=\"tick\" x1=\"" + place + "\" x2=\"" + place + "\" y1=\"" + bottom + "\" y2=\"" +
           std::to_string(height + 5) + "\"/>";
    svg += "<text class=\"x\" x=\"" + place + "\" y=\"" + std::to_string(height + 19) + "\">" + tick_text(tick) +
           "</text>\n";
  }
  svg += "<line class=\"axis\" x2=\"100%\" y1=\"" + bottom + "\" y2=\"" + bottom + "\"/>";
  svg += "<text class=\"x\" x=\"50%\" y=\"" + std::to_string(height + 38) + "\">step</text>\n";
  return svg;
}

/// An SVG as wide as the page. Text and dots keep their size at any width: they are placed in per cent; the lines are
/// in an inner SVG of 1000 x 1000 units that is stretched.
std::string render_chart(const Chart& chart) {
  std::vector<const Curve*> curves{&chart.dots};
  double first = kInfinity;
  double last = -kInfinity;
  for (const auto& [style, line] : chart.lines) {
    curves.push_back(&line);
    if (line.empty()) continue;
    first = std::min(first, line.front().x);
    last = std::max(last, line.back().x);
  }
  if (first > last) return "<p class=\"note\">Nothing was measured.</p>\n";
  const Axis x = step_axis(first, last);
  const Axis y = value_axis(curves, chart.from_zero, chart.height / 45);
  const auto height = std::to_string(chart.height);
  std::string svg = "<div class=\"chart\"><svg role=\"img\" aria-label=\"" + escaped(chart.label) + "\" height=\"" +
                    std::to_string(chart.height + 44) + "\">\n" + render_axes(x, y, chart.height);
  svg += "<svg width=\"100%\" height=\"" + height + "\" viewBox=\"0 0 1000 1000\" preserveAspectRatio=\"none\">\n";
  for (const auto& [style, line] : chart.lines) {
    svg += "<polyline class=\"" + style + "\" vector-effect=\"non-scaling-stroke\" points=\"";
    for (const auto& point : line) {
      svg += position(1000.0 * x.share(point.x)) + "," + position(1000.0 * (1.0 - y.share(point.y))) + " ";
    }
    svg += "\"/>\n";
  }
  svg += "</svg>\n";
  for (const auto& point : chart.dots) {
    svg += "<circle class=\"validation\" r=\"4\" cx=\"" + position(100.0 * x.share(point.x)) + "%\" cy=\"" +
           position(chart.height * (1.0 - y.share(point.y))) + "\"><title>validation loss " + loss_text(point.y) +
           " at step " + significant(point.x, 12) + "</title></circle>\n";
  }
  return svg + "</svg></div>\n";
}

// Parts of the page

std::string tile(const std::string& name, const std::string& value, const std::string& note = "") {
  return "<div><dt>" + name + "</dt><dd>" + value + (note.empty() ? "" : "<small>" + note + "</small>") +
         "</dd></div>\n";
}

double total_of(const Curve& curve) {
  double sum = 0.0;
  for (const auto& point : curve) sum += point.y;
  return sum;
}

double median_of(const Curve& curve) {
  std::vector<double> values;
  for (const auto& point : curve) values.push_back(point.y);
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

std::string render_losses(const std::vector<Step>& steps, const Curve& validation) {
  std::string html =
      tile("Training loss, last step", loss_text(steps.back().loss), "first step: " + loss_text(steps.front().loss));
  if (validation.empty()) return html;
  const auto best =
      std::min_element(validation.begin(), validation.end(), [](const Point& a, const Point& b) { return a.y < b.y; });
  return html + tile("Validation loss, last", loss_text(validation.back().y),
                     "lowest: " + loss_text(best->y) + " at step " + grouped(std::llround(best->x)));
}

std::string render_headline(const ReportInput& input, const std::vector<Step>& steps, const Curve& validation) {
  const auto tokens = curve_of(steps, [](const Step& step) { return step.tokens; });
  const auto images = curve_of(steps, [](const Step& step) { return step.images; });
  const auto speed = curve_of(steps, [](const Step& step) { return step.tokens_per_second; });
  std::string html = "<dl class=\"tiles\">\n" + render_losses(steps, validation);
  html += tile("Steps", grouped(steps.back().step));
  if (!speed.empty()) html += tile("Tokens per second", grouped(std::llround(median_of(speed))), "median of the steps");
  if (!tokens.empty()) {
    html += tile("Tokens seen", grouped(std::llround(total_of(tokens))),
                 images.empty() ? "" : "with " + grouped(std::llround(total_of(images))) + " pictures");
  }
  if (input.num_parameters > 0) html += tile("Parameters", grouped(input.num_parameters));
  if (input.num_ranks > 0) html += tile("Ranks", grouped(input.num_ranks));
  return html + "</dl>\n";
}

std::string render_loss_curve(const std::vector<Step>& steps, const Curve& validation) {
  const auto loss = curve_of(steps, [](const Step& step) { return std::optional<double>(step.loss); });
  Chart chart;
  chart.label =
      "Loss over steps: training from " + loss_text(steps.front().loss) + " to " + loss_text(steps.back().loss);
  chart.lines = {{"raw", thinned(loss)}, {"mean", thinned(smoothed(loss))}};
  chart.dots = thinned(validation);
  std::string html =
      "<section><h2>Loss</h2>\n<p class=\"legend\"><span class=\"raw\">training, each step</span>"
      "<span class=\"mean\">training, smoothed</span>";
  if (!validation.empty()) html += "<span class=\"validation\">validation (held-out pictures)</span>";
  return html + "</p>\n" + render_chart(chart) + "</section>\n";
}

std::string render_small_curve(const std::string& title, const Curve& curve) {
  Chart chart;
  chart.label = title + " over steps";
  chart.height = 140;
  chart.from_zero = true;
  chart.lines = {{"single", thinned(curve)}};
  return "<section><h2>" + title + "</h2>\n" + render_chart(chart) + "</section>\n";
}

std::string render_curves(const std::vector<Step>& steps, const Curve& validation) {
  return render_loss_curve(steps, validation) + "<div class=\"pair\">\n" +
         render_small_curve("Learning rate", curve_of(steps, [](const Step& step) { return step.learning_rate; })) +
         render_small_curve("Gradient norm", curve_of(steps, [](const Step& step) { return step.grad_norm; })) +
         "</div>\n";
}

/// The picture in an <img>, or a note why it isn't.
std::string render_image(const std::filesystem::path& file) {
  const auto name = escaped(file.filename().string());
  const auto bytes = read_bytes(file);
  if (!bytes) return "<p class=\"note\">" + name + " can&#39;t be read</p>\n";
  const bool png = bytes->starts_with("\x89PNG");
  if (!png && !bytes->starts_with("\xFF\xD8\xFF")) {
    return "<p class=\"note\">" + name + " is neither PNG nor JPEG</p>\n";
  }
  return "<img alt=\"" + name + "\" title=\"" + name + "\" src=\"data:image/" + (png ? "png" : "jpeg") + ";base64," +
         base64(*bytes) + "\">\n";
}

std::string render_pictures_of(const std::vector<ReportPicture>& pictures, bool held_out) {
  const auto wanted = [&](const ReportPicture& picture) { return picture.held_out == held_out; };
  if (std::none_of(pictures.begin(), pictures.end(), wanted)) return "";
  const std::string kind = held_out ? "held-out" : "training";
  std::string html = held_out ? "<h3>Held out <small>never trained on</small></h3>\n"
                              : "<h3>Training <small>in the training set</small></h3>\n";
  html += "<div class=\"pictures\">\n";
  for (const auto& picture : pictures) {
    if (!wanted(picture)) continue;
    html += "<article class=\"" + kind + "\"><div class=\"frame\">" + render_image(picture.file) + "</div>\n";
    html += "<p class=\"badge\">" + kind + "</p>\n<dl><dt>true</dt><dd>" + escaped(picture.caption) +
            "</dd><dt>generated</dt><dd>" +
            (picture.generated.empty() ? "<i>nothing</i>" : escaped(picture.generated)) + "</dd></dl></article>\n";
  }
  return html + "</div>\n";
}

std::string render_pictures(const std::vector<ReportPicture>& pictures) {
  if (pictures.empty()) return "";
  return "<section><h2>Pictures and captions</h2>\n" + render_pictures_of(pictures, true) +
         render_pictures_of(pictures, false) + "</section>\n";
}

/// A table for each run of keys with the same "section." in front.
std::string render_settings(const std::vector<std::pair<std::string, std::string>>& settings) {
  if (settings.empty()) return "";
  std::string html = "<section><h2>Settings</h2>\n<div class=\"settings\">\n";
  std::optional<std::string> open;
  for (const auto& [key, value] : settings) {
    const auto dot = key.find('.');
    const auto section = dot == std::string::npos ? "" : key.substr(0, dot);
    if (open != section) {
      html += (open ? "</table>\n<table><caption>" : "<table><caption>") + escaped(section) + "</caption>\n";
      open = section;
    }
    html += "<tr><th scope=\"row\">" + escaped(dot == std::string::npos ? key : key.substr(dot + 1)) + "</th><td>" +
            escaped(value) + "</td></tr>\n";
  }
  return html + "</table>\n</div></section>\n";
}

}  // namespace

std::string render_report(const ReportInput& input) {
  const auto steps = read_metrics(input.metrics);
  const auto validation = curve_of(steps, [](const Step& step) { return step.validation_loss; });
  const auto title = escaped(input.title);
  std::string html =
      "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
      "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>" +
      title + "</title>\n<style>" + kReportStyle + "</style>\n</head>\n<body>\n<h1>" + title + "</h1>\n";
  if (steps.empty()) {
    html += "<p class=\"note\">No step has been made yet.</p>\n";
  } else {
    html += render_headline(input, steps, validation) + render_curves(steps, validation);
  }
  return html + render_pictures(input.pictures) + render_settings(input.settings) + "</body>\n</html>\n";
}

}  // namespace step37
