// Crops, views and tokens of a picture: what the reference processor makes of golden pictures, and the edges of each
// rule.
#include "step37/data/crop_plan.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "step37/data/picture.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

/// The reference processor's answers, and the ids that this test gives to the symbols.
class ReferenceProcessor : public ::testing::Test {
 protected:
  void SetUp() override {
    std::ifstream file(kFolder + "/processor.json");
    ASSERT_TRUE(file) << kFolder;
    images_ = nlohmann::json::parse(file).at("images");
    ASSERT_FALSE(images_.empty());
  }

  static CropPlan plan_of(const nlohmann::json& image) {
    return plan_crops(image.at("width").get<int64_t>(), image.at("height").get<int64_t>(), CropOptions{});
  }

  static void expect_view(const at::Tensor& view, const nlohmann::json& expected, const std::string& name) {
    const double deviations[3] = {0.26862954, 0.26130258, 0.27577711};
    for (int64_t channel = 0; channel < 3; ++channel) {
      const auto c = static_cast<size_t>(channel);
      const double bound = 2.0 / 255.0 / deviations[c];
      for (const auto& sample : expected.at("samples_yx_rgb")) {
        const auto value = view[channel][sample[0].get<int64_t>()][sample[1].get<int64_t>()].item<double>();
        EXPECT_NEAR(value, sample[2 + c].get<double>(), bound) << name << " channel " << channel << " at " << sample;
      }
      // Means over many pixels differ much less than a single one may.
      EXPECT_NEAR(view[channel].mean().item<double>(), expected.at("mean")[c].get<double>(), bound / 10) << name;
      EXPECT_NEAR(view[channel].std().item<double>(), expected.at("std")[c].get<double>(), bound / 10) << name;
    }
  }

  static inline const std::string kFolder = test_support::cases() / "images";
  nlohmann::json images_;
};

TEST_F(ReferenceProcessor, Plans) {
  for (const auto& image : images_) {
    SCOPED_TRACE(image.at("file"));
    const auto& expected = image.at("plan");
    const auto plan = plan_of(image);
    EXPECT_EQ(nlohmann::json({plan.global_width, plan.global_height}), expected.at("global_wh"));
    EXPECT_EQ(nlohmann::json({plan.crop_width, plan.crop_height}), expected.at("crop_wh"));
    EXPECT_EQ(plan.window, expected.at("window").get<int64_t>());
    EXPECT_EQ(plan.nx, expected.at("nx").get<int64_t>());
    EXPECT_EQ(plan.ny, expected.at("ny").get<int64_t>());
    EXPECT_EQ(plan.square_pad, expected.at("square_pad").get<bool>());
    EXPECT_EQ(plan.num_crops(), image.at("num_local_patches").get<int64_t>());
    const auto& mask = image.at("newline_mask");
    EXPECT_EQ(newline_mask(plan), mask.is_null() ? std::vector<bool>() : mask.get<std::vector<bool>>());
  }
}

TEST_F(ReferenceProcessor, TokenLayouts) {
  const PictureTokenIds ids{1, 2, 3, 4, 5, 6};
  const std::map<std::string, int64_t> id_of = {{"<im_start>", 1},    {"<im_patch>", 2},  {"<im_end>", 3},
                                                {"<patch_start>", 4}, {"<patch_end>", 5}, {"<patch_newline>", 6}};
  for (const auto& image : images_) {
    SCOPED_TRACE(image.at("file"));
    std::vector<int64_t> expected;
    for (const auto& entry : image.at("tokens")) {
      const auto text = entry.get<std::string>();
      const auto star = text.find('*');
      const size_t count = star == std::string::npos ? 1 : std::stoul(text.substr(star + 1));
      expected.insert(expected.end(), count, id_of.at(text.substr(0, star)));
    }
    const auto tokens = picture_tokens(plan_of(image), CropOptions{}, ids);
    EXPECT_EQ(tokens, expected);
    EXPECT_EQ(tokens.size(), image.at("num_tokens").get<size_t>());
  }
}

TEST_F(ReferenceProcessor, Views) {
  for (const auto& image : images_) {
    SCOPED_TRACE(image.at("file"));
    const auto decoded = decode_picture(fs::path(kFolder) / image.at("file").get<std::string>());
    ASSERT_TRUE(decoded.ok()) << decoded.error;
    ASSERT_EQ(decoded.pixels.size(1), image.at("height").get<int64_t>());
    ASSERT_EQ(decoded.pixels.size(2), image.at("width").get<int64_t>());
    const auto views = cut_views(decoded.pixels, plan_of(image), CropOptions{});
    ASSERT_EQ(views.global.sizes().vec(), image.at("pixel_values_shape").get<std::vector<int64_t>>());
    expect_view(normalize(views.global)[0], image.at("global_view"), "global view");

    const auto local = image.value("local", nlohmann::json::array());
    ASSERT_EQ(views.crops.sizes(), (std::vector<int64_t>{static_cast<int64_t>(local.size()), 3, 504, 504}));
    const auto crops = normalize(views.crops);
    for (size_t i = 0; i < local.size(); ++i) {
      expect_view(crops[static_cast<int64_t>(i)], local[i], "crop " + std::to_string(i));
    }
  }
}

struct PlanCase {
  int64_t width, height;
  bool square_pad;
  int64_t global_width, global_height, window, crop_width, crop_height, nx, ny;
};

TEST(CropPlan, EdgesOfEachRule) {
  const std::vector<PlanCase> cases = {
      {728, 728, false, 728, 728, 0, 728, 728, 0, 0},          // fits the global view
      {728, 485, false, 728, 485, 485, 970, 485, 2, 1},        // 1.501 > 1.5
      {600, 400, false, 600, 400, 0, 600, 400, 0, 0},          // exactly 1.5
      {729, 729, false, 729, 729, 504, 1008, 1008, 2, 2},      // just larger
      {1600, 400, false, 1600, 400, 504, 1512, 400, 3, 1},     // ratio exactly 4: the remainder 88 < 100.8 goes down
      {1604, 400, false, 1604, 400, 400, 1600, 400, 4, 1},     // above 4: windows of the short side
      {3024, 604, false, 3024, 604, 504, 3024, 504, 6, 1},     // the remainder 100 is below 100.8
      {3024, 605, false, 3024, 605, 504, 3024, 1008, 6, 2},    // 101 is above
      {31, 125, true, 125, 125, 0, 125, 125, 0, 0},            // degenerate
      {31, 124, false, 31, 124, 31, 31, 124, 1, 4},            // ratio exactly 4
      {32, 129, false, 32, 129, 32, 32, 128, 1, 4},            // 32 pixels suffice
      {20, 4000, true, 3024, 3024, 504, 3024, 3024, 6, 6},     // padded, then scaled down
      {6048, 3024, false, 3024, 1512, 504, 3024, 1512, 6, 3},  // scaled down
      {32, 100000, false, 1, 3024, 1, 1, 3024, 1, 3024},       // scaled down, but not to nothing
      {1, 1, false, 1, 1, 0, 1, 1, 0, 0},
  };
  for (const auto& c : cases) {
    SCOPED_TRACE(::testing::Message() << c.width << " x " << c.height);
    const auto plan = plan_crops(c.width, c.height, CropOptions{});
    EXPECT_EQ(plan.square_pad, c.square_pad);
    EXPECT_EQ(plan.global_width, c.global_width);
    EXPECT_EQ(plan.global_height, c.global_height);
    EXPECT_EQ(plan.window, c.window);
    EXPECT_EQ(plan.crop_width, c.crop_width);
    EXPECT_EQ(plan.crop_height, c.crop_height);
    EXPECT_EQ(plan.nx, c.nx);
    EXPECT_EQ(plan.ny, c.ny);
  }
}

TEST(CropPlan, SmallModelsUseSmallViews) {
  const CropOptions options{.global_side = 56, .crop_side = 42, .max_side = 168};
  EXPECT_EQ(options.global_tokens(), 1);
  EXPECT_EQ(options.crop_tokens(), 1);
  EXPECT_EQ(CropOptions{}.global_tokens(), 169);
  EXPECT_EQ(CropOptions{}.crop_tokens(), 81);
  const auto plan = plan_crops(100, 60, options);
  EXPECT_EQ(plan.window, 42);
  EXPECT_EQ(plan.nx, 3);  // 100 = 2 * 42 + 16, 16 > 8.4
  EXPECT_EQ(plan.ny, 2);  // 60 = 42 + 18
  const auto views = cut_views(black_picture(60, 100), plan, options);
  EXPECT_EQ(views.global.sizes(), (std::vector<int64_t>{1, 3, 56, 56}));
  EXPECT_EQ(views.crops.sizes(), (std::vector<int64_t>{6, 3, 42, 42}));
  EXPECT_EQ(newline_mask(plan), (std::vector<bool>{false, false, true, false, false, false}));
}

TEST(CropPlan, CropsAreCutRowByRow) {
  // 84 x 126 pixels: 2 rows of 3 windows, each of one colour; no scaling anywhere.
  const CropOptions options{.global_side = 56, .crop_side = 42, .max_side = 168};
  auto picture = black_picture(84, 126);
  for (int64_t i = 0; i < 6; ++i) picture.narrow(1, i / 3 * 42, 42).narrow(2, i % 3 * 42, 42).fill_(10 + i);
  const auto views = cut_views(picture, plan_crops(126, 84, options), options);
  ASSERT_EQ(views.crops.size(0), 6);
  for (int64_t i = 0; i < 6; ++i) EXPECT_TRUE(at::equal(views.crops[i], at::full({3, 42, 42}, 10 + i, at::kByte)));
}

TEST(CropPlan, CropsCanBeSwitchedOff) {
  const CropOptions options{.with_crops = false};
  const auto plan = plan_crops(6048, 3024, options);
  EXPECT_EQ(plan.num_crops(), 0);
  EXPECT_EQ(plan.global_width, 3024);
  EXPECT_TRUE(newline_mask(plan).empty());
  EXPECT_EQ(picture_tokens(plan, options, {1, 2, 3, 4, 5, 6}).size(), 171U);
  EXPECT_TRUE(plan_crops(20, 400, options).square_pad);
}

TEST(CropPlan, WrongSizesAreNamed) {
  EXPECT_TRUE(contains(value_error([] { plan_crops(0, 5, CropOptions{}); }), "0 x 5"));
  EXPECT_TRUE(contains(value_error([] { plan_crops(5, 5, CropOptions{.global_side = 50}); }), "global_side 50"));
  EXPECT_TRUE(contains(value_error([] { plan_crops(5, 5, CropOptions{.crop_side = 0}); }), "crop_side 0"));
  EXPECT_TRUE(contains(value_error([] {
                         cut_views(at::zeros({4, 4}, at::kByte), CropPlan{}, CropOptions{});
                       }),
                       "[4, 4]"));
}

}  // namespace
}  // namespace megatron_cpp::step37
