// Pictures of every format as Pillow reads them, broken ones and oversized ones; and resizing and normalizing by hand.
#include "step37/data/picture.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <random>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "tests/support/environment.h"
#include "tests/support/errors.h"
#include "tests/support/stb_image_write.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

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

// tests/cases/images/formats, written and read by Pillow, turned as it turns them (ImageOps.exif_transpose). JPEG's
// last bits are the decoder's business, as are CMYK's.
TEST(Picture, EveryFormatAsPillowReadsIt) {
  const fs::path folder = test_support::cases() / "images/formats";
  const SafetensorsFile expected(folder / "expected.safetensors");
  EXPECT_EQ(expected.entries().size(), 42U);
  for (const auto& [name, entry] : expected.entries()) {
    const auto decoded = decode_picture(folder / name);
    EXPECT_TRUE(decoded.ok()) << decoded.error;
    EXPECT_EQ(decoded.damage, "") << name;
    if (!decoded.ok()) continue;
    const auto want = expected.read(name);
    const auto header = read_picture_header(folder / name);
    EXPECT_EQ(at::IntArrayRef({3, header.size.height, header.size.width}), want.sizes()) << name << header.error;
    EXPECT_EQ(decoded.pixels.sizes(), want.sizes()) << name;
    if (decoded.pixels.sizes() != want.sizes()) continue;
    const bool is_exact = fs::path(name).extension() != ".jpg" && name != "cmyk.tif";
    EXPECT_LE((decoded.pixels.to(at::kInt) - want.to(at::kInt)).abs().max().item<int>(), is_exact ? 0 : 2) << name;
  }
}

TEST(Picture, TheBytesTellTheFormatNotTheName) {
  const fs::path formats = test_support::cases() / "images/formats";
  const TemporaryFolder folder;
  const auto expected = decode_picture(formats / "rgb_lossless.webp");
  const auto renamed = decode_picture(folder.write("a.jpg", read_file(formats / "rgb_lossless.webp")));
  ASSERT_TRUE(renamed.ok()) << renamed.error;
  EXPECT_TRUE(at::equal(renamed.pixels, expected.pixels));
}

TEST(Picture, FilesOfOtherKindsAreNamedByKind) {
  using namespace std::string_view_literals;
  const TemporaryFolder folder;
  for (const auto& [bytes, name] :
       {std::pair("\0\0\0\x18"
                  "ftypheic\0\0\0\0"sv,
                  "it is HEIF, which isn't read"),
        std::pair("\0\0\0\x18"
                  "ftypavif\0\0\0\0"sv,
                  "it is AVIF, which isn't read"),
        std::pair("<svg xmlns="sv, "it is SVG, HTML or other XML, which isn't read"),
        std::pair("hello"sv, "it is none of PNG, JPEG, WebP, GIF, BMP, TIFF"), std::pair(""sv, "it is empty")}) {
    const auto path = folder.write("a.jpg", bytes);
    EXPECT_EQ(read_picture_header(path).error, name);
    EXPECT_EQ(decode_picture(path).error, "picture " + path.string() + " can't be read: " + name);
  }
  EXPECT_EQ(read_picture_header(folder.path() / "none.jpg").error, "it isn't there");
  EXPECT_EQ(read_picture_header(folder.path()).error, "it isn't a file");
}

// What arrived of a JPEG is shown; cut files of the other formats are refused, and none is taken for a whole one.
TEST(Picture, CutFilesAreNotTakenForWholeOnes) {
  const fs::path formats = test_support::cases() / "images/formats";
  const TemporaryFolder folder;
  for (const auto* name : {"rgb_420.jpg", "rgb_lossless.webp", "palette.gif", "rgb.bmp", "lzw.tiff", "rgba.png"}) {
    const auto file = read_file(formats / name);
    const auto path = folder.write(name, file.substr(0, file.size() - file.size() / 4));
    const auto decoded = decode_picture(path);
    EXPECT_TRUE(contains(decoded.error + decoded.damage, path.string())) << name;
    EXPECT_EQ(decoded.ok(), std::string_view(name) == "rgb_420.jpg") << decoded.error;
  }
  EXPECT_TRUE(contains(decode_picture(folder.path() / "rgb_420.jpg").damage, " is damaged: "));
}

TEST(Picture, Thumbnail) {
  const TemporaryFolder folder;
  const auto wide = at::arange(3 * 20 * 100, at::kLong).remainder(251).to(at::kByte).view({3, 20, 100});
  const auto small = decode_picture(folder.write("small.png", thumbnail(wide, 50)));
  ASSERT_TRUE(small.ok()) << small.error;
  EXPECT_TRUE(at::equal(small.pixels, resize(wide, 10, 50)));
  EXPECT_TRUE(at::equal(decode_picture(folder.write("same.png", thumbnail(wide, 100))).pixels, wide));
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
    const auto error =
        std::string("it has ") + text + " pixels; at most 134217728 are read, where a sliver counts as a square";
    EXPECT_EQ(read_picture_header(path).error, error);
    EXPECT_EQ(decode_picture(path).error, "picture " + path.string() + " can't be read: " + error);
  }
  const auto narrow = read_picture_header(with_size("\x00\x01\x00\x00\x00\x00\x00\x20"sv));
  EXPECT_EQ(narrow.error, "");
  EXPECT_EQ(narrow.size.width, 65536);
  // The other formats' headers, of sides that are legal there, and no pixels behind them.
  const auto bmp =
      "BM\0\0\0\0\0\0\0\0\x36\0\0\0\x28\0\0\0\x30\x75\0\0\x30\x75\0\0\1\0\x18\0\0\0\0\0"s + std::string(24, '\0');
  const auto gif = "GIF89a\xff\xff\xff\xff\0\0\0"s;
  const auto tiff =
      "II*\0\x08\0\0\0\4\0\0\1\4\0\1\0\0\0\x30\x75\0\0\1\1\4\0\1\0\0\0\x30\x75\0\0"
      "\x11\1\4\0\1\0\0\0\x08\0\0\0\x17\1\4\0\1\0\0\0\x08\0\0\0\0\0\0\0"s;
  for (const auto& file : {bmp, gif, tiff}) {
    EXPECT_TRUE(contains(decode_picture(folder.write("large", file)).error, " pixels; at most 134217728 are read"));
  }
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

}  // namespace
}  // namespace megatron_cpp::step37
