// A folder of features: names of pictures, chunks that are there completely or not at all, what is refused.
#include "step37/data/picture_features.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "step37/data/data_set.h"
#include "tests/step37/small_pictures.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

constexpr int64_t kChannels = 32;  // of the tower below
constexpr const char* kChecksum = "00112233445566778899aabbccddeeff";

/// A global view gives 1 row, a crop 1.
FeatureSource source() {
  return {.vision = {.image_size = 28, .width = 8, .layers = 1, .heads = 2, .mlp_width = 16},
          .crops = {.global_side = 28, .crop_side = 14, .max_side = 112, .vision_patch_size = 14}};
}

class Features : public testing::Test {
 protected:
  fs::path folder() const { return root_.path() / "features"; }
  PictureNames names() const {
    return PictureNames(std::map<std::string, fs::path>{{"stamps", root_.path() / "pictures"}});
  }
  PictureReference picture(const std::string& name, int64_t side = 28) const {
    return {.path = (root_.path() / "pictures" / name).string(), .width = side, .height = side};
  }
  PictureFeatures open(const FeatureSource& of = source()) const { return {folder(), names(), of}; }
  void begin() const { begin_feature_folder(folder(), source(), kChecksum); }
  std::string error_at_start(const FeatureSource& of, const std::string& checksum = kChecksum) const {
    return value_error([&] { begin_feature_folder(folder(), of, checksum); });
  }

  static int64_t rows_of(const PictureReference& picture) { return num_feature_rows(picture, source().crops); }

  /// Rows `first`, first + 1, ... times the channel's number: some aren't numbers of bfloat16.
  static at::Tensor values(const PictureReference& picture, double first) {
    return at::outer(at::arange(rows_of(picture), at::kFloat) + first, at::arange(kChannels, at::kFloat) + 0.3);
  }
  int64_t write(int64_t number, int rank, const std::vector<PictureReference>& pictures, double first) const {
    size_t next = 0;
    return write_feature_chunk(folder(), number, rank, names(), source(), pictures, [&] {
      const auto tensor = values(pictures.at(next), first + 100.0 * static_cast<double>(next));
      ++next;
      return tensor;
    });
  }
  static void expect_features(const PictureFeatures& features, const PictureReference& picture, double first) {
    const auto num_crops = rows_of(picture) - 1;
    const auto crops = at::zeros({num_crops, 1, kChannels}, at::kBFloat16);
    const auto global_view = at::zeros({1, kChannels}, at::kBFloat16);
    features.read(picture, crops, global_view);
    const auto expected = values(picture, first).to(at::kBFloat16);
    EXPECT_TRUE(at::equal(crops.flatten(0, 1), expected.narrow(0, 0, num_crops))) << picture.path;
    EXPECT_TRUE(at::equal(global_view, expected.narrow(0, num_crops, 1))) << picture.path;
  }

  TemporaryFolder root_;
};

TEST(PictureNames, ArePlacesInDataSets) {
  const PictureNames names({{"all", "data"}, {"inner", "data/stamps/"}, {"same", "data/stamps"}, {"web", "/w"}});
  const auto name = [&](const std::string& path, const PicturePlace& place = {}) {
    return names.name_of({.path = path, .place = place});
  };
  EXPECT_EQ(name("data/stamps/a/b.png"), "inner:a/b.png");
  EXPECT_EQ(name("./data//stamps/x/../b.png"), "inner:b.png");
  EXPECT_EQ(name("data/stampsb.png"), "all:stampsb.png");
  EXPECT_EQ(name("other/b.png"), ":other/b.png");
  EXPECT_EQ(name("data/../other.png"), ":other.png");
  EXPECT_EQ(name("/w/0.tar", {512, 20}), "web:0.tar#512+20");
  EXPECT_EQ(name("/w/0.tar#512+20"), "web:0.tar%23512+20");
  EXPECT_EQ(name("/w/100%.png"), "web:100%25.png");
  EXPECT_EQ(name("/w/\xC3\xA4.png"), "web:\xC3\xA4.png");
  EXPECT_EQ(name("/w/\xE4.png"), "web:%E4.png");
  for (const char* here : {"", "."}) {
    const PictureNames relative(std::map<std::string, fs::path>{{"here", here}});
    EXPECT_EQ(relative.name_of({.path = "a/b.png"}), "here:a/b.png");
  }
}

TEST_F(Features, AreReadAsTheyWereWritten) {
  const auto plain = picture("a.png");
  const auto cropped = picture("b.png", 60);
  EXPECT_GT(rows_of(cropped), 1);
  begin();
  EXPECT_EQ(next_feature_chunk(folder()), 0);
  const auto bytes = write(0, 0, {plain, cropped}, 1.0);
  EXPECT_EQ(bytes, static_cast<int64_t>(fs::file_size(folder() / "chunk-00000-rank-0000.safetensors")));
  write(0, 3, {picture("c.png")}, 7.0);
  EXPECT_EQ(next_feature_chunk(folder()), 1);
  const auto features = open();
  EXPECT_NO_THROW(features.check_tower(kChecksum));
  EXPECT_EQ(features.num_pictures(), 3);
  EXPECT_EQ(features.channels(), kChannels);
  expect_features(features, plain, 1.0);
  expect_features(features, cropped, 101.0);
  expect_features(features, picture("c.png"), 7.0);
  ASSERT_NE(features.find(cropped), nullptr);
  EXPECT_EQ(features.find(cropped)->size.width, 60);
  EXPECT_EQ(features.find(picture("d.png")), nullptr);
}

TEST_F(Features, APictureThatIsMissingOrHasChangedIsNamed) {
  begin();
  write(0, 0, {picture("a.png")}, 1.0);
  const auto features = open();
  const auto crops = at::zeros({0, 1, kChannels}, at::kBFloat16);
  const auto global_view = at::zeros({1, kChannels}, at::kBFloat16);
  EXPECT_TRUE(contains(value_error([&] { features.read(picture("d.png"), crops, global_view); }),
                       folder().string() +
                           " lacks the features of stamps:d.png: `step37 features` with this "
                           "configuration and --output " +
                           folder().string() + " adds what is missing"));
  const auto larger = picture("a.png", 60);
  EXPECT_TRUE(contains(value_error([&] {
                         features.read(larger, at::zeros({rows_of(larger) - 1, 1, kChannels}), global_view);
                       }),
                       "has features of stamps:a.png as 28 x 28 pixels, which it isn't any more (60 x 60)"));
}

// Sizes come from the folder, so that no picture has to be there.
TEST_F(Features, KnowTheSizesOfTheirPictures) {
  begin();
  write(0, 0, {picture("a.png", 60)}, 1.0);
  const auto features = open();
  SampleFormat format;
  format.crops = source().crops;
  EXPECT_EQ(reference_to(picture("a.png").path, format).width, 28);  // it isn't there: a square
  format.features = &features;
  EXPECT_EQ(reference_to(picture("a.png").path, format).width, 60);
  EXPECT_EQ(reference_to(picture("d.png").path, format).width, 28);
}

TEST_F(Features, AChunkIsThereCompletelyOrNotAtAll) {
  begin();
  write(0, 0, {picture("a.png")}, 1.0);
  int count = 0;
  const auto killed = [&]() -> at::Tensor {
    if (count++ > 0) throw std::runtime_error("killed");
    return values(picture("b.png"), 0.0);
  };
  EXPECT_TRUE(throws<std::runtime_error>(
      [&] {
        write_feature_chunk(folder(), 1, 0, names(), source(), {picture("b.png"), picture("c.png")}, killed);
      },
      "killed"));
  write_file(folder() / "chunk-00001-rank-0000.safetensors.0123.partial", "half");  // of a process that was killed
  write_file(folder() / "notes.txt", "mine");
  EXPECT_EQ(open().num_pictures(), 1);
  EXPECT_EQ(next_feature_chunk(folder()), 1);
  begin();
  remove_unfinished_chunks(folder());
  EXPECT_FALSE(fs::exists(folder() / "chunk-00001-rank-0000.safetensors.0123.partial"));
  EXPECT_TRUE(fs::exists(folder() / "notes.txt"));
  write(1, 5, {picture("b.png"), picture("c.png")}, 3.0);  // another rank goes on
  const auto features = open();
  expect_features(features, picture("a.png"), 1.0);
  expect_features(features, picture("c.png"), 103.0);
}

TEST_F(Features, TheNewestOfAPictureCounts) {
  begin();
  write(9, 0, {picture("a.png")}, 1.0);
  write(10, 0, {picture("a.png")}, 2.0);
  write(100000, 0, {picture("b.png")}, 3.0);
  write(99999, 1, {picture("b.png")}, 4.0);
  const auto features = open();
  expect_features(features, picture("a.png"), 2.0);
  expect_features(features, picture("b.png"), 3.0);
  EXPECT_EQ(next_feature_chunk(folder()), 100001);
}

TEST_F(Features, StampsTellWhetherAPictureHasChanged) {
  fs::create_directories(root_.path() / "pictures");
  begin();
  const auto there = picture("a.png");
  small_run::write_picture(there.path, 28, 28, 1);
  write(0, 0, {there, picture("none.png")}, 1.0);
  const auto features = open();
  EXPECT_EQ(features.find(there)->stamp, file_stamp(there));
  EXPECT_GT(file_stamp(there).modified, 0);
  EXPECT_EQ(features.find(picture("none.png"))->stamp, FileStamp{});
  fs::last_write_time(there.path, fs::last_write_time(there.path) + std::chrono::seconds(1));
  EXPECT_NE(features.find(there)->stamp, file_stamp(there));
  auto in_archive = there;
  in_archive.place = {0, 10};
  EXPECT_EQ(file_stamp(in_archive), FileStamp{});
}

TEST_F(Features, AnotherSourceIsRefusedByTheFirstKeyThatDiffers) {
  begin();
  EXPECT_EQ(error_at_start(source()), "nothing thrown");
  const auto refused = [&](const FeatureSource& other, const std::string& part) {
    const auto text =
        "the features in " + folder().string() + " are not of this configuration's vision tower and pictures: " + part;
    EXPECT_TRUE(contains(error_at_start(other), text));
    EXPECT_TRUE(contains(value_error([&] { open(other); }), text));
  };
  auto wider = source();
  wider.vision.width = 16;
  refused(wider, "vision.width is 8 there, here 16");
  auto whole = source();
  whole.crops.with_crops = false;
  refused(whole, "data.crops is true there, here false");
  auto larger = source();
  larger.crops.max_side = 56;
  refused(larger, "data.max_side is 112 there, here 56");
  auto rounded = source();
  rounded.precision = at::kBFloat16;
  refused(rounded, "training.precision is float32 there, here bfloat16");
  const auto text = fmt::format(
      "the features in {} are of a vision tower with other weights: their checksum is {} "
      "there, here 42",
      folder().string(), kChecksum);
  EXPECT_TRUE(contains(error_at_start(source(), "42"), text));
  EXPECT_TRUE(contains(value_error([&] { open().check_tower("42"); }), text));
}

TEST_F(Features, FoldersOfOthersAreLeftAlone) {
  EXPECT_TRUE(contains(value_error([&] { open(); }), folder().string() + " has no features.json"));
  write_file(folder() / "notes.txt", "mine");
  EXPECT_TRUE(contains(error_at_start(source()), folder().string()));
  EXPECT_FALSE(fs::exists(folder() / "features.json"));
}

TEST_F(Features, DamagedFilesAreNamed) {
  begin();
  write(0, 0, {picture("a.png")}, 1.0);
  const auto chunk = folder() / "chunk-00000-rank-0000.safetensors";
  const auto bytes = read_file(chunk);
  const auto expect_refused = [&](const std::string& contents, const std::string& part) {
    write_file(chunk, contents);
    EXPECT_TRUE(contains(value_error([&] { open(); }), chunk.string()));
    EXPECT_TRUE(contains(value_error([&] { open(); }), part));
  };
  expect_refused(bytes.substr(0, bytes.size() - 1), "truncated");
  auto renamed = bytes;
  renamed.replace(renamed.find("stamps:a.png"), 12, "stamps:b.png");  // in the metadata
  expect_refused(renamed, "its metadata lack stamps:a.png");
  auto unreadable = bytes;
  unreadable.replace(unreadable.find("width"), 5, "depth");
  expect_refused(unreadable, "width");
  write_safetensors(chunk, {{"stamps:a.png", at::zeros({1, 3})}});
  EXPECT_TRUE(contains(value_error([&] { open(); }), "has shape [1, 3], expected rows of 32 channels"));
  const auto manifest = read_file(folder() / "features.json");
  write_file(folder() / "features.json", manifest.substr(0, manifest.size() / 2));
  EXPECT_TRUE(contains(value_error([&] { open(); }), (folder() / "features.json").string()));
  auto newer = manifest;
  newer.replace(newer.find(": 1"), 3, ": 2");
  write_file(folder() / "features.json", newer);
  EXPECT_TRUE(contains(value_error([&] { open(); }), "is of format version 2"));
}

}  // namespace
}  // namespace megatron_cpp::step37
