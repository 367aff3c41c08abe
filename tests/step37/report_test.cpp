#include "step37/program/report.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using test_support::contains;

class ReportTest : public ::testing::Test {
 protected:
  fs::path file(const std::string& name, std::string_view bytes) const { return folder_.write(name, bytes); }
  ReportInput with_metrics(std::string_view lines) const {
    ReportInput input;
    input.title = "a run";
    input.metrics = file("metrics.jsonl", lines);
    return input;
  }
  /// The message that rendering metrics of these lines ends in, without the folder's name.
  std::string metrics_error(std::string_view lines) const {
    try {
      render_report(with_metrics(lines));
    } catch (const c10::ValueError& error) {
      const std::string message = error.what_without_backtrace();
      const auto prefix = folder_.path().string() + "/";
      EXPECT_EQ(message.find(prefix), 0U) << message;
      return message.substr(prefix.size());
    }
    return "no error";
  }

  test_support::TemporaryFolder folder_;
};

constexpr std::string_view kThreeSteps =
    R"({"step": 1, "loss": 6.9075, "grad_norm": 3.5, "learning_rate": 0.001, "tokens": 1000, "images": 40, )"
    R"("tokens_per_second": 500.0, "step_seconds": 2.0})"
    "\n"
    R"({"step": 2, "loss": 5.5, "grad_norm": 2.5, "learning_rate": 0.002, "tokens": 1200, "images": 41, )"
    R"("tokens_per_second": 1700.0, "step_seconds": 1.0, "validation_loss": 5.25})"
    "\n"
    R"({"step": 3, "loss": 4.125, "grad_norm": 1.5, "learning_rate": 0.001, "tokens": 1300, "images": 42, )"
    R"("tokens_per_second": 600.0, "step_seconds": 2.0, "validation_loss": 5.75})"
    "\n";

/// The JSON that the page draws itself from.
json data_of(const std::string& html) {
  constexpr std::string_view kBegin = "<script type=\"application/json\" id=\"run\">";
  const auto begin = html.find(kBegin) + kBegin.size();
  return json::parse(html.substr(begin, html.find("</script>", begin) - begin));
}

TEST_F(ReportTest, HoldsTheRun) {
  auto input = with_metrics(kThreeSteps);
  input.num_parameters = 1234567;
  input.num_ranks = 2;
  input.settings = {{"data.directory", "p"}, {"no_section", "1"}};
  input.pictures = {{"a.png", false, "a cat", "a dog", "\x89PNG"}, {"b.png", true, "a house", "", ""}};
  const auto run = data_of(render_report(input));
  EXPECT_EQ(run.at("title"), "a run");
  EXPECT_EQ(run.at("parameters"), 1234567);
  EXPECT_EQ(run.at("ranks"), 2);
  EXPECT_EQ(run.at("total_steps"), 0);
  input.total_steps = 9;
  EXPECT_EQ(data_of(render_report(input)).at("total_steps"), 9);
  EXPECT_EQ(run.at("totals"), (json{{"tokens", 3500.0}, {"images", 123.0}, {"tokens_per_second", 600.0}}));
  EXPECT_EQ(run.at("settings"), json::parse(R"([["data.directory", "p"], ["no_section", "1"]])"));
  ASSERT_EQ(run.at("steps").size(), 3U);
  EXPECT_EQ(run.at("steps")[1].at("validation_loss"), 5.25);
  EXPECT_EQ(run.at("steps")[0].contains("validation_loss"), false);
  EXPECT_EQ(run.at("steps")[2].at("learning_rate"), 0.001);
  EXPECT_EQ(run.at("pictures")[0], (json{{"name", "a.png"},
                                         {"held_out", false},
                                         {"caption", "a cat"},
                                         {"generated", "a dog"},
                                         {"thumbnail", "iVBORw=="}}));
  EXPECT_EQ(run.at("pictures")[1].at("thumbnail"), "");
}

TEST_F(ReportTest, FactsThatArentGivenAreLeftOut) {
  const auto run = data_of(render_report(with_metrics(R"({"step": 1, "loss": 2, "validation_loss": null})")));
  EXPECT_EQ(run.at("totals"), json::object());
  EXPECT_EQ(run.at("steps"), (json::array({{{"step", 1}, {"loss", 2}, {"mean_loss", 2.0}}})));
}

TEST_F(ReportTest, IsOnePageThatNeedsNothingElse) {
  const auto html = render_report(with_metrics(kThreeSteps));
  EXPECT_EQ(html.find("<!DOCTYPE html>"), 0U);
  EXPECT_TRUE(contains(html, "</html>"));
  for (const auto* part : {"<link", "@import", "src=\"http", "https:", "url(", "fetch(", "{{RUN}}"}) {
    EXPECT_FALSE(contains(html, part)) << part;
  }
  EXPECT_TRUE(contains(html, "prefers-color-scheme: dark"));
  EXPECT_TRUE(contains(html, "name=\"viewport\""));
}

TEST_F(ReportTest, NoTextEndsTheDataOrIsAnythingButAscii) {
  auto input = with_metrics(kThreeSteps);
  input.title = "</script><b>&title";
  input.settings = {{"a<.b&", std::string("\"v'<script>\0\xff", 13)}};
  input.pictures = {{"no<file>\xE9.png", true, "<!-- \u2028\U0001F986", "generated </article>", ""}};
  const auto html = render_report(input);
  EXPECT_TRUE(std::all_of(html.begin(), html.end(), [](char c) { return (c >= ' ' && c <= '~') || c == '\n'; }));
  for (const auto* part : {"<b>", "<script>\"", "<file>", "<!--", "</article>"})
    EXPECT_FALSE(contains(html, part)) << part;
  const auto run = data_of(html);
  EXPECT_EQ(run.at("title"), "</script><b>&title");
  EXPECT_EQ(run.at("pictures")[0].at("name"), "no<file>\uFFFD.png");
  EXPECT_EQ(run.at("pictures")[0].at("caption"), "<!-- \u2028\U0001F986");
}

TEST_F(ReportTest, LongRunsAreThinnedButKeepEndsAndSpikes) {
  std::string lines;
  for (int step = 1; step <= 50000; ++step) {
    const double loss = step == 31234 ? 90.0 : step == 1 ? 80.0 : 10.0 + std::sin(step);
    lines += R"({"step": )" + std::to_string(step) + R"(, "loss": )" + std::to_string(loss) +
             R"(, "grad_norm": 1, "learning_rate": 0.1, "tokens": 10)" +
             (step % 1000 == 0 ? R"(, "validation_loss": )" + std::to_string(step == 7000 ? 1 : 3) : "") + "}\n";
  }
  const auto html = render_report(with_metrics(lines));
  EXPECT_LT(html.size(), 200000U);
  const auto run = data_of(html);
  const auto& steps = run.at("steps");
  EXPECT_LE(steps.size(), 1000U);
  EXPECT_GT(steps.size(), 600U);
  EXPECT_EQ(steps.front().at("step"), 1);
  EXPECT_EQ(steps.back().at("step"), 50000);
  const auto has = [&](const char* name, double value) {
    return std::any_of(steps.begin(), steps.end(), [&](const json& step) { return step.value(name, 0.0) == value; });
  };
  EXPECT_TRUE(has("loss", 90.0));
  EXPECT_TRUE(has("validation_loss", 1.0));
  EXPECT_EQ(run.at("totals").at("tokens"), 500000.0) << "of all steps";
  // A mean of all 50000 steps, not of the ones that are shown.
  EXPECT_NEAR(steps.at(steps.size() / 4).at("mean_loss").get<double>(), 10.0, 0.01);
}

TEST_F(ReportTest, RunsOfNoStepHaveAPage) {
  EXPECT_EQ(data_of(render_report(with_metrics(""))).at("steps"), json::array());
}

TEST_F(ReportTest, BrokenMetricsAreRefusedWithTheirLine) {
  const std::string good = "{\"step\": 1, \"loss\": 2}\n";
  EXPECT_EQ(metrics_error(good + "{\"step\": 2, \"lo"), "metrics.jsonl:2: not a JSON object: {\"step\": 2, \"lo");
  EXPECT_EQ(metrics_error(good + "\n" + good), "metrics.jsonl:2: not a JSON object: ");
  EXPECT_EQ(metrics_error("[1]\n"), "metrics.jsonl:1: not a JSON object: [1]");
  EXPECT_EQ(metrics_error("{\"loss\": 2}\n"), "metrics.jsonl:1: no integer `step`");
  EXPECT_EQ(metrics_error("{\"step\": 1.5, \"loss\": 2}\n"), "metrics.jsonl:1: no integer `step`");
  EXPECT_EQ(metrics_error(good + "{\"step\": 2}\n"), "metrics.jsonl:2: no number `loss`");
  EXPECT_EQ(metrics_error("{\"step\": 1, \"loss\": \"low\"}\n"), "metrics.jsonl:1: loss is \"low\", expected a number");
  EXPECT_EQ(metrics_error("{\"step\": 1, \"loss\": 1, \"tokens\": true}\n"),
            "metrics.jsonl:1: tokens is true, expected a number");
  EXPECT_EQ(metrics_error(good + good), "metrics.jsonl:2: step 1 after step 1");
}

TEST_F(ReportTest, MetricsThatArentThereAreRefused) {
  ReportInput input;
  input.metrics = folder_.path() / "none.jsonl";
  try {
    render_report(input);
    FAIL() << "no error";
  } catch (const c10::ValueError& error) {
    EXPECT_TRUE(contains(error.what_without_backtrace(), "none.jsonl: No such file or directory"));
  }
}

}  // namespace
}  // namespace megatron_cpp::step37
