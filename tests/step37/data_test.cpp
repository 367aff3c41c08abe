#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/crop_plan.h"
#include "step37/data/picture.h"
#include "step37/data/tokenizer.h"
#include "step37/data/utf8.h"
#include "tests/support/errors.h"
#include "tests/support/stb_image_write.h"
#include "tests/support/temporary_folder.h"

namespace step37 {
namespace {

namespace fs = std::filesystem;

using test_support::contains;
using test_support::read_file;
using test_support::TemporaryFolder;
using test_support::value_error;

// ---- captioned_pictures ----

TEST(Captions, FirstLineThatIsNotBlank) {
  EXPECT_EQ(caption_from_text("A duck."), "A duck.");
  EXPECT_EQ(caption_from_text("A duck.\nfr.utf8=Un canard.\n"), "A duck.");
  EXPECT_EQ(caption_from_text("\xEF\xBB\xBF  A duck. \t\r\nmore\r\n"), "A duck.");
  EXPECT_EQ(caption_from_text("\r\n \t \n\n\xC3\x89t\xC3\xA9  2 \n"), "\xC3\x89t\xC3\xA9  2");
  EXPECT_EQ(caption_from_text(""), "");
  EXPECT_EQ(caption_from_text("\xEF\xBB\xBF"), "");
  EXPECT_EQ(caption_from_text(" \r\n\n\t"), "");
  EXPECT_EQ(caption_from_text("\xC9t\xE9 \n"), "\uFFFDt\uFFFD") << "Latin-1 isn't UTF-8";
}

TEST(Utf8, WellFormedAndNot) {
  using namespace std::string_view_literals;
  for (const auto text : {""sv, "a\0b"sv, "\xC2\x80"sv, "\xDF\xBF"sv, "\xE0\xA0\x80"sv, "\xED\x9F\xBF"sv,
                          "\xEE\x80\x80"sv, "\xEF\xBF\xBF"sv, "\xF0\x90\x80\x80"sv, "\xF4\x8F\xBF\xBF"sv}) {
    EXPECT_TRUE(is_utf8(text)) << text;
    EXPECT_EQ(to_utf8(text), text);
  }
  // Alone, cut, overlong, surrogates, beyond U+10FFFF.
  for (const auto text :
       {"\x80"sv, "\xC2"sv, "\xC0\x80"sv, "\xC1\xBF"sv, "\xE0\x9F\xBF"sv, "\xE1\x80"sv, "\xED\xA0\x80"sv,
        "\xF0\x8F\xBF\xBF"sv, "\xF4\x90\x80\x80"sv, "\xF5\x80\x80\x80"sv, "\xFF"sv}) {
    EXPECT_FALSE(is_utf8(text)) << text;
    std::string replaced;
    for (size_t i = 0; i < text.size(); ++i) replaced += "\uFFFD";
    EXPECT_EQ(to_utf8(std::string("a").append(text).append("b")), std::string("a").append(replaced).append("b"));
  }
}

TEST(CaptionedPictures, SortedByBytesAndCounted) {
  const TemporaryFolder folder;
  for (const auto* name : {"b.png", "a/z.PNG", "B.jpg", "a.jpeg", "a/b/c.png", "none.png", "empty.png", "note.gif"}) {
    folder.write(name, "not opened by the scan");
  }
  for (const auto* name : {"b.txt", "a/z.txt", "B.txt", "a.txt", "a/b/c.txt", "note.txt"}) {
    folder.write(name, std::string("Caption of ") + name + "\r\nrest");
  }
  folder.write("empty.txt", "\xEF\xBB\xBF\r\n  \n");

  const auto found = scan_captioned_pictures(folder.path());
  std::vector<std::string> paths;
  for (const auto& picture : found.pictures) paths.push_back(picture.path);
  EXPECT_EQ(paths, (std::vector<std::string>{"B.jpg", "a.jpeg", "a/b/c.png", "a/z.PNG", "b.png"}));
  EXPECT_EQ(found.pictures.at(2).caption, "Caption of a/b/c.txt");
  EXPECT_EQ(found.num_without_caption_file, 1);
  EXPECT_EQ(found.num_with_empty_caption, 1);
  EXPECT_EQ(found.folder, folder.path());
}

TEST(CaptionedPictures, FolderAtFaultIsNamed) {
  const TemporaryFolder folder;
  const auto missing = folder.path() / "missing";
  EXPECT_TRUE(contains(value_error([&] { scan_captioned_pictures(missing); }), missing.string()));

  const auto file = folder.write("file", "x");
  EXPECT_TRUE(contains(value_error([&] { scan_captioned_pictures(file); }), file.string()));

  folder.write("lonely/one.png", "x");
  const auto message = value_error([&] { scan_captioned_pictures(folder.path() / "lonely"); });
  EXPECT_TRUE(contains(message, (folder.path() / "lonely").string()));
  EXPECT_TRUE(contains(message, "of 1 pictures"));
}

TEST(HeldOut, DependsOnThePathAlone) {
  std::vector<CaptionedPicture> pictures;
  pictures.reserve(2000);
  for (int i = 0; i < 2000; ++i) pictures.push_back({"animals/picture" + std::to_string(i) + ".png", "x"});
  const auto split = split_held_out(pictures);
  EXPECT_EQ(split.training.size() + split.held_out.size(), pictures.size());
  // 100 expected, standard deviation 10.
  EXPECT_GT(split.held_out.size(), 60U);
  EXPECT_LT(split.held_out.size(), 140U);

  std::set<std::string> held_out;
  for (const auto& picture : split.held_out) held_out.insert(picture.path);
  pictures.erase(pictures.begin(), pictures.begin() + 700);
  for (const auto& picture : split_held_out(pictures).held_out) EXPECT_TRUE(held_out.count(picture.path));
  for (const auto& picture : split_held_out(pictures).training) EXPECT_FALSE(held_out.count(picture.path));
}

TEST(HeldOut, IsTheSameOnEveryMachineAndGrowsWithTheFraction) {
  // From a second implementation, in Python: a change of the hash would move pictures between the sets of runs that
  // already exist.
  std::vector<int> held_out;
  for (int i = 0; i < 400; ++i) {
    const auto path = std::to_string(i) + ".png";
    if (is_held_out(path, 0.05)) held_out.push_back(i);
    EXPECT_FALSE(is_held_out(path, 0.0));
    EXPECT_TRUE(is_held_out(path, 1.0));
    EXPECT_TRUE(!is_held_out(path, 0.05) || is_held_out(path, 0.1));
  }
  EXPECT_EQ(held_out, (std::vector<int>{109, 110, 191, 199, 232, 283, 323, 339, 342}));
  EXPECT_TRUE(contains(value_error([] { is_held_out("a", 1.5); }), "1.5"));
  EXPECT_TRUE(contains(value_error([] { is_held_out("a", -0.1); }), "-0.1"));
}

// ---- picture ----

at::Tensor bytes(const std::vector<int64_t>& values, const std::vector<int64_t>& shape) {
  return at::tensor(values, at::kLong).view(shape).to(at::kByte);
}

TEST(Picture, AlphaOverWhiteByHand) {
  const TemporaryFolder folder;
  // 2 rows of 3 pixels RGBA; alpha 0, 255, 51 (a fifth), 128, 1, 254.
  const std::vector<uint8_t> rgba = {9,   8,   7, 0,   10, 20, 30,  255, 200, 100, 0,   51,
                                     255, 128, 0, 128, 0,  0,  127, 1,   1,   254, 100, 254};
  const auto path = folder.path() / "alpha.png";
  ASSERT_NE(stbi_write_png(path.c_str(), 3, 2, 4, rgba.data(), 12), 0);
  const auto decoded = decode_picture(path);
  ASSERT_TRUE(decoded.ok()) << decoded.error;
  // Row 2: 127 + 128 = 255; 128*128/255 + 127 = 191.25; 127; 254; 254; 127/255 + 254 = 254.498; 254/255 + 1 = 1.996;
  // 254*254/255 + 1 = 254.004; 100*254/255 + 1 = 100.6.
  EXPECT_TRUE(at::equal(decoded.pixels, bytes({255, 10, 244, 255, 254, 2,     //
                                               255, 20, 224, 191, 254, 254,   //
                                               255, 30, 204, 127, 254, 101},  //
                                              {3, 2, 3})))
      << decoded.pixels;
}

TEST(Picture, GrayAndGrayWithAlpha) {
  const TemporaryFolder folder;
  const auto gray = folder.path() / "gray.png";
  const std::vector<uint8_t> gray_pixels = {0, 100, 255};
  ASSERT_NE(stbi_write_png(gray.c_str(), 3, 1, 1, gray_pixels.data(), 3), 0);
  EXPECT_TRUE(at::equal(decode_picture(gray).pixels, bytes({0, 100, 255, 0, 100, 255, 0, 100, 255}, {3, 1, 3})));

  const auto with_alpha = folder.path() / "gray_alpha.png";
  const std::vector<uint8_t> alpha_pixels = {0, 255, 100, 0, 100, 51};
  ASSERT_NE(stbi_write_png(with_alpha.c_str(), 1, 3, 2, alpha_pixels.data(), 2), 0);
  EXPECT_TRUE(at::equal(decode_picture(with_alpha).pixels, bytes({0, 255, 224, 0, 255, 224, 0, 255, 224}, {3, 3, 1})));
}

TEST(Picture, SixteenBitAndTransparentPalette) {
  using namespace std::string_view_literals;
  // Made with Python's zlib. 2 x 1 pixels: gray 0x1234, 0xfe99.
  constexpr auto kGray16 =
      "\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR\x00\x00\x00\x02\x00\x00\x00\x01\x10\x00\x00\x00\x00\x81\xd9\xfc\x15"
      "\x00\x00\x00\x0dIDAT\x78\xda\x63\x10\x32\xf9\x37\x13\x00\x03\x7e\x01\xde\xc6\xdc\x65\xb5"
      "\x00\x00\x00\x00IEND\xae\x42\x60\x82"sv;
  // Palette (10, 20, 30) opaque, (200, 100, 50) with alpha 51; the pixels are colours 1 and 0.
  constexpr auto kPalette =
      "\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR\x00\x00\x00\x02\x00\x00\x00\x01\x08\x03\x00\x00\x00\xc3\xfc\x8f\xb8"
      "\x00\x00\x00\x06PLTE\x0a\x14\x1e\xc8\x64\x32\x77\xa0\xb3\x9c\x00\x00\x00\x02tRNS\xff\x33\x5a\x67\x51\x5c"
      "\x00\x00\x00\x0bIDAT\x78\xda\x63\x60\x64\x00\x00\x00\x05\x00\x02\x42\xc2\x44\x9f"
      "\x00\x00\x00\x00IEND\xae\x42\x60\x82"sv;
  const TemporaryFolder folder;
  const auto gray = decode_picture(folder.write("gray16.png", kGray16));
  ASSERT_TRUE(gray.ok()) << gray.error;
  EXPECT_TRUE(at::equal(gray.pixels, bytes({0x12, 0xfe, 0x12, 0xfe, 0x12, 0xfe}, {3, 1, 2})));
  const auto palette = decode_picture(folder.write("palette.png", kPalette));
  ASSERT_TRUE(palette.ok()) << palette.error;
  EXPECT_TRUE(at::equal(palette.pixels, bytes({244, 10, 224, 20, 214, 30}, {3, 1, 2}))) << palette.pixels;
}

TEST(Picture, Jpeg) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "plain.jpg";
  std::vector<uint8_t> pixels;
  for (int i = 0; i < 16 * 8; ++i) pixels.insert(pixels.end(), {200, 100, 50});
  ASSERT_NE(stbi_write_jpg(path.c_str(), 16, 8, 3, pixels.data(), 95), 0);
  const auto decoded = decode_picture(path);
  ASSERT_TRUE(decoded.ok()) << decoded.error;
  ASSERT_EQ(decoded.pixels.sizes(), (std::vector<int64_t>{3, 8, 16}));
  const auto expected = bytes({200, 100, 50}, {3, 1, 1}).to(at::kInt);
  EXPECT_LE((decoded.pixels.to(at::kInt) - expected).abs().max().item<int>(), 3);
}

// tests/cases/images/formats, written and read by Pillow 13. JPEG's last bits are the decoder's business.
TEST(Picture, EveryFormatAsPillowReadsIt) {
  const fs::path folder = MCPP_TEST_CASES "/images/formats";
  const megatron::SafetensorsFile expected(folder / "expected.safetensors");
  EXPECT_EQ(expected.entries().size(), 11U);
  for (const auto& [name, entry] : expected.entries()) {
    const auto decoded = decode_picture(folder / name);
    ASSERT_TRUE(decoded.ok()) << decoded.error;
    const auto want = expected.read(name);
    ASSERT_EQ(decoded.pixels.sizes(), want.sizes()) << name;
    const int tolerance = fs::path(name).extension() == ".jpg" ? 2 : 0;
    EXPECT_LE((decoded.pixels.to(at::kInt) - want.to(at::kInt)).abs().max().item<int>(), tolerance) << name;
  }
}

TEST(Picture, BrokenFilesAreNamed) {
  const TemporaryFolder folder;
  const auto whole = folder.path() / "whole.png";
  const std::vector<uint8_t> noise = [] {
    std::mt19937 generator(1);
    std::vector<uint8_t> values(size_t{40} * 30 * 3);
    for (auto& value : values) value = static_cast<uint8_t>(generator());
    return values;
  }();
  ASSERT_NE(stbi_write_png(whole.c_str(), 40, 30, 3, noise.data(), 120), 0);
  ASSERT_TRUE(decode_picture(whole).ok());

  const auto file = read_file(whole);
  const std::vector<fs::path> broken = {
      folder.path() / "missing.png",
      folder.path(),
      folder.write("empty.png", ""),
      folder.write("text.png", "this is no picture"),
      folder.write("cut.png", file.substr(0, file.size() / 2)),
      folder.write("header.png", file.substr(0, 20)),
      folder.write("one.jpg", "\xff"),
  };
  for (const auto& path : broken) {
    const auto decoded = decode_picture(path);
    EXPECT_FALSE(decoded.ok()) << path;
    EXPECT_FALSE(decoded.pixels.defined()) << path;
    EXPECT_TRUE(contains(decoded.error, path.string()));
  }
}

/// The four bytes that end a chunk of a PNG file (PNG specification, annex D).
std::string crc32(std::string_view chunk) {
  uint32_t sum = 0xffffffff;
  for (const char letter : chunk) {
    sum ^= static_cast<uint8_t>(letter);
    for (int bit = 0; bit < 8; ++bit) sum = (sum & 1) != 0 ? 0xedb88320 ^ (sum >> 1) : sum >> 1;
  }
  std::string bytes;
  for (const int shift : {24, 16, 8, 0}) bytes.push_back(static_cast<char>(~sum >> shift & 0xff));
  return bytes;
}

TEST(Picture, HeadersThatPromiseGigabytes) {
  using namespace std::string_literals;
  using namespace std::string_view_literals;
  const TemporaryFolder folder;
  const auto with_size = [&](std::string_view size) {
    const auto header = "IHDR"s.append(size).append("\x08\x00\x00\x00\x00"sv);
    return folder.write(
        "large.png",
        "\x89PNG\r\n\x1a\n\x00\x00\x00\x0d"s.append(header).append(crc32(header)).append("\x00\x00\x00\x00IDAT"sv));
  };
  // 30000 x 30000; 65536 x 1, which plan_crops would have padded to a square; 65536 x 32, the most it wouldn't.
  for (const auto& [size, text] : {std::pair("\x00\x00\x75\x30\x00\x00\x75\x30"sv, "30000 x 30000"),
                                   std::pair("\x00\x01\x00\x00\x00\x00\x00\x01"sv, "65536 x 1")}) {
    const auto path = with_size(size);
    EXPECT_FALSE(picture_size(path).has_value());
    EXPECT_EQ(decode_picture(path).error, "picture " + path.string() + " has " + text +
                                              " pixels; at most 134217728 are read, where a sliver counts as a square");
  }
  const auto narrow = picture_size(with_size("\x00\x01\x00\x00\x00\x00\x00\x20"sv));
  ASSERT_TRUE(narrow.has_value());
  EXPECT_EQ(narrow->width, 65536);
}

TEST(Picture, Black) {
  const auto black = black_picture(3, 5);
  EXPECT_TRUE(at::equal(black, at::zeros({3, 3, 5}, at::kByte)));
  EXPECT_TRUE(contains(value_error([] { black_picture(0, 5); }), "0 x 5"));
}

TEST(Picture, Resize) {
  // Halving with antialias: each output is the weighted mean of 4 inputs, 1 3 3 1 (2 at an edge: 3 3 1 of 7).
  const auto row = bytes({0, 70, 140, 210}, {1, 1, 4}).expand({3, 1, 4});
  const auto half = resize(row, 1, 2);
  EXPECT_TRUE(at::equal(half, bytes({50, 160}, {1, 1, 2}).expand({3, 1, 2}))) << half;
  // A view with strides, and a batch, give what a plain picture gives.
  const auto wide = at::arange(3 * 8 * 10, at::kLong).to(at::kByte).view({3, 8, 10});
  const auto part = wide.narrow(1, 1, 5).narrow(2, 2, 7);
  EXPECT_TRUE(at::equal(resize(part, 9, 4), resize(part.contiguous(), 9, 4)));
  EXPECT_TRUE(at::equal(resize(part.unsqueeze(0), 9, 4)[0], resize(part, 9, 4)));
  EXPECT_TRUE(resize(wide, 8, 10).is_same(wide));
  EXPECT_TRUE(contains(value_error([&] { resize(wide, 0, 4); }), "to 0 x 4"));
  EXPECT_TRUE(contains(value_error([&] { resize(wide.to(at::kFloat), 4, 4); }), "Float"));
  EXPECT_TRUE(contains(value_error([&] { resize(wide[0], 4, 4); }), "[8, 10]"));
}

TEST(Picture, Normalize) {
  const auto normal = normalize(bytes({0, 255, 0, 255, 0, 255}, {1, 3, 1, 2}));
  const auto expected = at::tensor({-0.48145466 / 0.26862954, 0.51854534 / 0.26862954, -0.4578275 / 0.26130258,
                                    0.5421725 / 0.26130258, -0.40821073 / 0.27577711, 0.59178927 / 0.27577711},
                                   at::kFloat);
  EXPECT_TRUE(at::allclose(normal, expected.view({1, 3, 1, 2}), 1e-6, 1e-6)) << normal;
  EXPECT_EQ(normalize(at::empty({0, 3, 4, 4}, at::kByte)).sizes(), (std::vector<int64_t>{0, 3, 4, 4}));
  EXPECT_TRUE(contains(value_error([] { normalize(black_picture(4, 4)); }), "[3, 4, 4]"));
}

// ---- crop_plan ----

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

  static inline const std::string kFolder = MCPP_TEST_CASES "/images";
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

// ---- tokenizer ----

const std::vector<std::string>& captions() {
  static const std::vector<std::string> list = {
      "A US 25 cent piece ($.25) called a quarter.",
      "A US “Sacagawea” dollar ($1.00).",
      "A yellow rubber duck.",
      "A yellow school bus.",
      "A red school house on a green hill.",
      "The letter A, painted in red.",
      "A crème brûlée - a French dessert.",
      "An orange; it’s a fruit!",
      "A penguin from the south: the king penguin.",
      "A green tree frog on a green leaf.",
      "Two  spaces, a\ttab and a trailing space ",
      " A leading space",
      "the quick brown fox jumps over the lazy dog 0123456789",
  };
  return list;
}

constexpr int64_t kVocabSize = 400;

TEST(Tokenizer, RoundTrip) {
  const auto tokenizer = Tokenizer::train(captions(), kVocabSize);
  EXPECT_LE(tokenizer.vocab_size(), kVocabSize);
  for (const auto& caption : captions()) {
    const auto ids = tokenizer.encode(caption);
    EXPECT_EQ(tokenizer.decode(ids), caption);
    EXPECT_LT(ids.size(), caption.size()) << caption;  // pairs were merged
    EXPECT_EQ(std::count(ids.begin(), ids.end(), tokenizer.unk_id()), 0) << caption;
  }
  EXPECT_TRUE(tokenizer.encode("").empty());
  EXPECT_EQ(tokenizer.decode({}), "");
}

TEST(Tokenizer, UnknownCharactersAreSpelledInBytes) {
  const auto tokenizer = Tokenizer::train(captions(), kVocabSize);
  for (const std::string text : {"日本語", "🦆 duck", "naïve Ωμέγα", "½\n²\r\n", "ﬁ ﬀ Å"}) {
    const auto ids = tokenizer.encode(text);
    EXPECT_EQ(tokenizer.decode(ids), text);
    EXPECT_EQ(std::count(ids.begin(), ids.end(), tokenizer.unk_id()), 0) << text;
  }
}

TEST(Tokenizer, SpecialIds) {
  const auto tokenizer = Tokenizer::train(captions(), kVocabSize);
  std::set<int64_t> ids = {tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()};
  EXPECT_EQ(ids, (std::set<int64_t>{0, 1, 2, 3}));
  for (const auto symbol : kPictureSymbols) ids.insert(tokenizer.id_of(symbol));
  EXPECT_EQ(ids.size(), 10U);
  EXPECT_EQ(*ids.rbegin(), 9);
  EXPECT_EQ(tokenizer.id_of("<unk>"), tokenizer.unk_id());

  // They leave no trace in text.
  auto sequence = tokenizer.encode("A duck.");
  sequence.insert(sequence.begin(), {tokenizer.bos_id(), tokenizer.id_of("<im_start>"), tokenizer.id_of("<im_patch>"),
                                     tokenizer.id_of("<im_end>")});
  sequence.insert(sequence.end(), {tokenizer.eos_id(), tokenizer.pad_id()});
  EXPECT_EQ(tokenizer.decode(sequence), "A duck.");
  EXPECT_TRUE(contains(value_error([&] { tokenizer.id_of("<video>"); }), "<video>"));
  EXPECT_TRUE(contains(value_error([&] { tokenizer.decode({tokenizer.vocab_size()}); }), "isn't in [0, "));
  EXPECT_TRUE(contains(value_error([&] { tokenizer.decode({-1}); }), "id -1"));
}

TEST(Tokenizer, TextNeverTurnsIntoASpecialId) {
  // Even captions that are full of the symbols don't teach it to.
  auto list = captions();
  for (const auto symbol : kPictureSymbols) list.insert(list.end(), 20, std::string(symbol));
  for (const auto& tokenizer : {Tokenizer::train(captions(), kVocabSize), Tokenizer::train(list, kVocabSize)}) {
    std::string all;
    std::vector<std::string> texts = {"<s>",   "</s>", "<unk>", "<pad>", "a<im_start>b", "<im_<im_start>start>",
                                      "<0x41>"};
    for (const auto symbol : kPictureSymbols) texts.emplace_back(symbol);
    for (const auto& text : texts) all += text;
    texts.push_back(all);
    for (const auto& text : texts) {
      const auto ids = tokenizer.encode(text);
      EXPECT_EQ(tokenizer.decode(ids), text);
      for (const int64_t id : ids) EXPECT_GE(id, 10) << text;
    }
  }
}

TEST(Tokenizer, TrainingTwiceGivesTheSameModel) {
  const TemporaryFolder folder;
  const auto first = Tokenizer::train(captions(), kVocabSize);
  const auto second = Tokenizer::train(captions(), kVocabSize);
  for (const auto& caption : captions()) EXPECT_EQ(first.encode(caption), second.encode(caption));
  first.save(folder.path() / "first.model");
  second.save(folder.path() / "second.model");
  EXPECT_EQ(read_file(folder.path() / "first.model"), read_file(folder.path() / "second.model"));
}

TEST(Tokenizer, SaveAndLoad) {
  const TemporaryFolder folder;
  const auto path = folder.path() / "captions.model";
  const auto trained = Tokenizer::train(captions(), kVocabSize);
  trained.save(path);
  const auto loaded = Tokenizer::load(path);
  EXPECT_EQ(loaded.vocab_size(), trained.vocab_size());
  EXPECT_EQ(loaded.pad_id(), trained.pad_id());
  EXPECT_EQ(loaded.id_of("<patch_newline>"), trained.id_of("<patch_newline>"));
  for (const auto& caption : captions()) EXPECT_EQ(loaded.encode(caption), trained.encode(caption));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);  // no temporary file is left
}

TEST(Tokenizer, ModelFileAtFaultIsNamed) {
  const TemporaryFolder folder;
  for (const auto& path : {folder.path() / "missing.model", folder.path(), folder.write("empty.model", ""),
                           folder.write("text.model", "this is no model")}) {
    EXPECT_TRUE(contains(value_error([&] { Tokenizer::load(path); }), path.string()));
  }

  const auto good = folder.path() / "good.model";
  Tokenizer::train(captions(), kVocabSize).save(good);
  // In the file a piece is its text, 0x15 and four bytes of score, then 0x18 and its type: 3 control, 4 user-defined.
  auto bytes_of_model = read_file(good);
  const auto symbol = bytes_of_model.find("<im_start>");
  const auto type = symbol + 10 + 5 + 1;
  ASSERT_EQ(bytes_of_model.at(type), 3);

  auto user_defined = bytes_of_model;
  user_defined.at(type) = 4;
  const auto unsafe = folder.write("unsafe.model", user_defined);
  const auto message = value_error([&] { Tokenizer::load(unsafe); });
  EXPECT_TRUE(contains(message, unsafe.string()));
  EXPECT_TRUE(contains(message, "<im_start>"));

  bytes_of_model.replace(symbol, 10, "<xx_start>");
  const auto renamed = folder.write("renamed.model", bytes_of_model);
  const auto tokenizer = Tokenizer::load(renamed);
  const auto missing = value_error([&] { tokenizer.id_of("<im_start>"); });
  EXPECT_TRUE(contains(missing, "<im_start>"));
  EXPECT_TRUE(contains(missing, renamed.string()));
}

TEST(Tokenizer, WrongTrainingArguments) {
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train({}, kVocabSize); }), "no captions"));
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train(captions(), 266); }), "266"));
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train(captions(), 270); }), "270"));  // fewer than there are letters
  EXPECT_TRUE(contains(value_error([] { Tokenizer::train({"", ""}, kVocabSize); }), "2 captions"));
}

TEST(Tokenizer, FewCaptionsGiveFewPieces) {
  const auto tokenizer = Tokenizer::train({"a duck", "a bus"}, 5000);
  EXPECT_LT(tokenizer.vocab_size(), 300);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a duck")), "a duck");
}

}  // namespace
}  // namespace step37
