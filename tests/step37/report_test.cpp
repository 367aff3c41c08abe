#include "step37/program/report.h"

#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace step37 {
namespace {

namespace fs = std::filesystem;
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

size_t count(const std::string& text, std::string_view part) {
  size_t found = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++found;
  return found;
}

TEST_F(ReportTest, ShowsTheHeadlineNumbers) {
  auto input = with_metrics(kThreeSteps);
  input.num_parameters = 1234567;
  input.num_ranks = 2;
  const auto html = render_report(input);
  for (const auto* part : {">4.125<", "first step: 6.907", ">5.750<", "lowest: 5.250 at step 2", ">600<", ">3,500<",
                           "with 123 pictures", ">1,234,567<"}) {
    EXPECT_TRUE(contains(html, part)) << part;
  }
}

TEST_F(ReportTest, FactsThatArentGivenAreLeftOut) {
  const auto html = render_report(with_metrics(R"({"step": 1, "loss": 2, "validation_loss": null})"));
  for (const auto* part : {"Parameters", "Ranks", "Tokens", "Validation loss", "<circle"}) {
    EXPECT_FALSE(contains(html, part)) << part;
  }
  EXPECT_EQ(count(html, "Nothing was measured."), 2U);
}

TEST_F(ReportTest, DrawsTheCurves) {
  const auto html = render_report(with_metrics(kThreeSteps));
  EXPECT_EQ(count(html, "<polyline class=\"raw\""), 1U);
  EXPECT_EQ(count(html, "<polyline class=\"mean\""), 1U);
  EXPECT_EQ(count(html, "<polyline class=\"single\""), 2U);
  EXPECT_EQ(count(html, "<circle class=\"validation\""), 2U);
  // Losses from 4.125 to 6.9075 on an axis from 4 to 7; steps from 1 to 3.
  EXPECT_TRUE(contains(html, "points=\"0.0,30.8 500.0,500.0 1000.0,958.3 \"")) << html;
  EXPECT_TRUE(contains(html, "validation loss 5.250 at step 2"));
  for (const auto* tick : {">4<", ">4.5<", ">7<", ">0.002<"}) EXPECT_TRUE(contains(html, tick)) << tick;
}

TEST_F(ReportTest, IsOnePageThatNeedsNothingElse) {
  auto input = with_metrics(kThreeSteps);
  input.pictures = {{file("a.png", "\x89PNG\r\n\x1a\n"), false, "a cat", "a dog"}};
  const auto html = render_report(input);
  EXPECT_EQ(html.find("<!DOCTYPE html>"), 0U);
  EXPECT_TRUE(contains(html, "</html>"));
  for (const auto* part : {"<script", "<link", "@import", "http:", "https:", "url("}) {
    EXPECT_FALSE(contains(html, part)) << part;
  }
  EXPECT_TRUE(contains(html, "prefers-color-scheme: dark"));
  EXPECT_TRUE(contains(html, "name=\"viewport\""));
}

TEST_F(ReportTest, EscapesEveryText) {
  auto input = with_metrics(kThreeSteps);
  input.title = "<b>&title";
  input.settings = {{"a<.b&", "\"v'<script>"}, {"no_section", "<i>"}};
  input.pictures = {{folder_.path() / "no<file>.png", true, "true <img>", "generated </article>"}};
  const auto html = render_report(input);
  for (const auto* part :
       {"<title>&lt;b&gt;&amp;title</title>", "<caption>a&lt;</caption>", "b&amp;</th>", "&quot;v&#39;&lt;script&gt;",
        "no&lt;file&gt;.png", "true &lt;img&gt;", "generated &lt;/article&gt;"}) {
    EXPECT_TRUE(contains(html, part)) << part;
  }
  for (const auto* part : {"<b>", "<script>", "true <img>", "no<file>"}) EXPECT_FALSE(contains(html, part)) << part;
}

TEST_F(ReportTest, CarriesThePicturesBytes) {
  auto input = with_metrics(kThreeSteps);
  input.pictures = {{file("a.png", "\x89PNG"), false, "a cat", "a dog"},
                    {file("b.JPG", "\xFF\xD8\xFF"), true, "a house", ""},
                    {file("c.png", "\xFF\xD8\xFF\xE0\x01"), true, "a tree", "a tree"}};
  const auto html = render_report(input);
  EXPECT_TRUE(contains(html, "src=\"data:image/png;base64,iVBORw==\""));
  EXPECT_TRUE(contains(html, "src=\"data:image/jpeg;base64,/9j/\""));
  EXPECT_TRUE(contains(html, "src=\"data:image/jpeg;base64,/9j/4AE=\""));
  EXPECT_EQ(count(html, "<p class=\"badge\">held-out</p>"), 2U);
  EXPECT_EQ(count(html, "<p class=\"badge\">training</p>"), 1U);
  EXPECT_TRUE(contains(html, "<dt>true</dt><dd>a house</dd><dt>generated</dt><dd><i>nothing</i></dd>"));
}

TEST_F(ReportTest, APictureThatCantBeShownBecomesANote) {
  auto input = with_metrics(kThreeSteps);
  input.pictures = {{folder_.path() / "gone.png", false, "a cat", "a dog"},
                    {folder_.path(), false, "a folder", "a dog"},
                    {file("text.png", "hello"), true, "a text", "a dog"}};
  const auto html = render_report(input);
  EXPECT_TRUE(contains(html, "gone.png can&#39;t be read"));
  EXPECT_TRUE(contains(html, "text.png is neither PNG nor JPEG"));
  EXPECT_TRUE(contains(html, "a folder"));
  EXPECT_FALSE(contains(html, "<img"));
}

TEST_F(ReportTest, LongRunsAreThinnedButKeepEndsAndSpikes) {
  std::string lines;
  for (int step = 1; step <= 50000; ++step) {
    const double loss = step == 31234 ? 90.0 : step == 1 ? 80.0 : 10.0 + std::sin(step);
    lines += R"({"step": )" + std::to_string(step) + R"(, "loss": )" + std::to_string(loss) +
             R"(, "grad_norm": 1, "learning_rate": 0.1, "validation_loss": 3})" + "\n";
  }
  const auto html = render_report(with_metrics(lines));
  EXPECT_LT(html.size(), 400000U);
  const auto begin = html.find("points=\"") + 8;
  const auto points = html.substr(begin, html.find('"', begin) - begin);
  EXPECT_LE(count(points, ","), 1000U);
  EXPECT_GT(count(points, ","), 900U);
  // The axis goes from 0 to 100: 80 at the first step, 90 at step 31234.
  EXPECT_EQ(points.find("0.0,200.0 "), 0U) << points.substr(0, 40);
  EXPECT_TRUE(contains(points, "624.7,100.0 "));
  EXPECT_TRUE(contains(points, " 1000.0,"));
  EXPECT_LE(count(html, "<circle"), 1000U);
  EXPECT_TRUE(contains(html, ">20k<"));
}

TEST_F(ReportTest, RunsOfNoOrOneStepOrConstantValuesHaveAPage) {
  EXPECT_TRUE(contains(render_report(with_metrics("")), "No step has been made yet."));
  for (const auto* lines :
       {"{\"step\": 1, \"loss\": 0, \"grad_norm\": 0}\n",
        "{\"step\": 1, \"loss\": 2.5}\n{\"step\": 2, \"loss\": 2.5}\n", "{\"step\": 100, \"loss\": -1e-9}\n"}) {
    const auto html = render_report(with_metrics(lines));
    EXPECT_TRUE(contains(html, "<polyline")) << lines;
    EXPECT_FALSE(contains(html, "nan")) << lines;
    EXPECT_FALSE(contains(html, "inf")) << lines;
  }
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
}  // namespace step37
