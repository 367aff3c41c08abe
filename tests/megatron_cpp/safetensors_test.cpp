#include "megatron_cpp/checkpoint/safetensors.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <gtest/gtest.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/checksum.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "tests/support/errors.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;
using namespace test_support;

/// Equal dtype, shape and bits.
bool same(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() && a.is_contiguous() &&
         (a.numel() == 0 || std::memcmp(a.const_data_ptr(), b.contiguous().const_data_ptr(), a.nbytes()) == 0);
}

class Safetensors : public testing::Test {
 protected:
  fs::path file() const { return folder_.path() / "a.safetensors"; }

  /// A file of this header and so many bytes of data.
  void write_raw(const std::string& header, size_t data_bytes) const {
    std::ofstream stream(file(), std::ios::binary);
    const uint64_t length = header.size();
    stream.write(reinterpret_cast<const char*>(&length), sizeof(length));
    stream << header << std::string(data_bytes, '\0');
  }
  /// What opening such a file throws.
  std::string error_of(const std::string& header, size_t data_bytes) const {
    write_raw(header, data_bytes);
    return open_error();
  }
  std::string open_error() const {
    const auto text = value_error([&] { const SafetensorsFile opened(file()); });
    EXPECT_TRUE(contains(text, file().string())) << text;
    return text;
  }

  test_support::TemporaryFolder folder_;
};

}  // namespace

TEST_F(Safetensors, EveryDtypeComesBack) {
  const auto values = at::arange(-6, 6, at::kLong).view({3, 4});
  std::vector<NamedTensor> tensors;
  for (const auto dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                           at::kChar, at::kByte, at::kBool}) {
    tensors.push_back({c10::toString(dtype), values.to(dtype)});
  }
  write_safetensors(file(), tensors, {{"format", "pt"}, {"note", "\"quoted\" ü"}});
  const SafetensorsFile read(file());
  EXPECT_EQ(read.entries().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_TRUE(same(read.read(name), tensor)) << name;
  EXPECT_EQ(read.metadata().at("note"), "\"quoted\" ü");
  EXPECT_EQ(read.metadata().size(), 2U);
  EXPECT_TRUE(read.contains("Half"));
  EXPECT_FALSE(read.contains("half"));
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_.path()), {}), 1);
}

TEST_F(Safetensors, SpecialValuesKeepTheirBits) {
  const auto bits =
      at::tensor({0x7fc00001, 0x7f800000, static_cast<int>(0xff800000U), static_cast<int>(0x80000000U), 1}, at::kInt);
  write_safetensors(file(), {{"x", bits.view(at::kFloat)}});
  EXPECT_TRUE(same(SafetensorsFile(file()).read("x").view(at::kInt), bits));
}

TEST_F(Safetensors, EmptyScalarAndStridedTensors) {
  const auto matrix = at::arange(24, at::kFloat).view({2, 3, 4});
  const std::vector<NamedTensor> tensors{{"empty", at::empty({0, 5})},
                                         {"one byte", at::ones({1}, at::kByte)},
                                         {"scalar", at::scalar_tensor(2.5)},
                                         {"transposed", matrix.transpose(0, 2)},
                                         {"narrow", matrix.narrow(1, 1, 2)},
                                         {"expanded", at::ones({1}).expand({3})},
                                         {"gradient", at::ones({2}).requires_grad_()}};
  write_safetensors(file(), tensors);
  const SafetensorsFile read(file());
  for (const auto& [name, tensor] : tensors) {
    const auto back = read.read(name);
    EXPECT_TRUE(same(back, tensor.detach())) << name;
    EXPECT_FALSE(back.requires_grad());
  }
}

TEST_F(Safetensors, AFileWithoutTensors) {
  write_safetensors(file(), {});
  EXPECT_TRUE(SafetensorsFile(file()).entries().empty());
}

TEST_F(Safetensors, WhatWasReadOutlivesFileAndReader) {
  write_safetensors(file(), {{"x", at::arange(4)}});
  const auto x = SafetensorsFile(file()).read("x");
  fs::remove(file());
  EXPECT_TRUE(same(x, at::arange(4)));
}

TEST_F(Safetensors, SlicesOfEveryDimension) {
  const auto x = at::arange(3 * 4 * 5, at::kFloat).view({3, 4, 5});
  write_safetensors(file(), {{"before", at::ones({3}, at::kByte)}, {"x", x}});
  const SafetensorsFile read(file());
  for (int64_t dim = 0; dim < 3; ++dim) {
    for (int64_t begin = 0; begin <= x.size(dim); ++begin) {
      for (int64_t length = 0; begin + length <= x.size(dim); ++length) {
        const auto box = Box::rows({3, 4, 5}, dim, {begin, begin + length});
        EXPECT_TRUE(same(read.read("x", box), x.narrow(dim, begin, length))) << box.text();
      }
    }
  }
  EXPECT_TRUE(same(read.read("x", {{1, 0, 2}, {2, 3, 2}}), x.narrow(0, 1, 2).narrow(1, 0, 3).narrow(2, 2, 2)));
}

TEST_F(Safetensors, SlicesThatAreNotThere) {
  write_safetensors(file(), {{"x", at::zeros({3, 4})}});
  const SafetensorsFile read(file());
  const auto error = [&](const Box& box) {
    const auto text = value_error([&] { read.read("x", box); });
    EXPECT_TRUE(contains(text, "tensor x of shape [3, 4]") && contains(text, file().string())) << text;
    return text;
  };
  EXPECT_TRUE(contains(error({{0, 2}, {3, 3}}), "no part [0:3, 2:5]"));
  error({{0, 0, 0}, {3, 4, 1}});
  error({{0}, {3}});
  error({{-1, 0}, {1, 4}});
  error({{1, 0}, {-1, 4}});
  error({{1, 0}, {INT64_MAX, 4}});
  error({{4, 0}, {0, 4}});
  for (const auto& text : {value_error([&] { read.read("y"); }), value_error([&] { read.read("y", {{0}, {1}}); })}) {
    EXPECT_TRUE(contains(text, "no tensor y") && contains(text, file().string())) << text;
  }
}

TEST_F(Safetensors, FilesThatAreNone) {
  EXPECT_TRUE(contains(open_error(), "No such file"));
  std::ofstream(file()) << "short";
  EXPECT_TRUE(contains(open_error(), "5 bytes are no safetensors file"));
  fs::remove(file());
  fs::create_directory(file());
  EXPECT_TRUE(contains(open_error(), "not a regular file"));
}

TEST_F(Safetensors, HeadersOfWrongLength) {
  for (const uint64_t length : {uint64_t{3}, uint64_t{1} << 40, UINT64_MAX, UINT64_MAX - 7}) {
    std::ofstream(file(), std::ios::binary).write(reinterpret_cast<const char*>(&length), 8) << "{}";
    EXPECT_TRUE(contains(open_error(), "header of " + std::to_string(length) + " bytes does not fit")) << length;
  }
}

TEST_F(Safetensors, HeadersThatSayNothingSensible) {
  for (const std::string header : {"", "{", "[]", "3", "{} x", "{\"x\": \xff}"}) {
    EXPECT_TRUE(contains(error_of(header, 0), "not a JSON object")) << header;
  }
  const auto entry = [](const std::string& fields) { return "{\"x\": {" + fields + "}}"; };
  EXPECT_TRUE(contains(error_of("{\"x\": 3}", 0), "tensor x"));
  EXPECT_TRUE(contains(error_of(entry(R"("dtype": "F32", "shape": [1])"), 4), "tensor x: "));
  EXPECT_TRUE(contains(error_of(entry(R"("dtype": 1, "shape": [1], "data_offsets": [0, 4])"), 4), "tensor x: "));
  EXPECT_TRUE(contains(error_of(entry(R"("dtype": "F32", "shape": [1], "data_offsets": [0])"), 4), "1 data offsets"));
  for (const char* number : {"1.0", "true", "\"1\"", "null", "1e300", "9223372036854775808", "36893488147419103232"}) {
    const std::string one = number;
    EXPECT_TRUE(contains(error_of(entry(R"("dtype": "U8", "data_offsets": [0, 1], "shape": [)" + one + "]"), 1),
                         "tensor x: shape is not a list of 64-bit integers"));
    EXPECT_TRUE(contains(error_of(entry(R"("dtype": "U8", "shape": [1], "data_offsets": [0, )" + one + "]"), 1),
                         "tensor x: data_offsets is not a list of 64-bit integers"));
  }
  EXPECT_TRUE(contains(error_of(R"({"__metadata__": 1})", 0), "__metadata__"));
  EXPECT_TRUE(contains(error_of(R"({"__metadata__": {"a": 1}})", 0), "metadata a"));
}

TEST_F(Safetensors, DtypesThatNothingComputesInAreNoFaultOfTheOthers) {
  const auto header = [](const std::string& dtype, const std::string& shape, int bytes) {
    return R"({"__metadata__": null, "odd": {"dtype": ")" + dtype + R"(", "shape": )" + shape +
           R"(, "data_offsets": [0, )" + std::to_string(bytes) + R"(]}, "x": {"dtype": "U8", "shape": [2], )" +
           R"("data_offsets": [)" + std::to_string(bytes) + ", " + std::to_string(bytes + 2) + "]}}";
  };
  const std::vector<std::pair<std::string, int>> dtypes{{"F4", 2},      {"F6_E2M3", 3}, {"F8_E4M3", 4}, {"F8_E5M2", 4},
                                                        {"F8_E8M0", 4}, {"U16", 8},     {"U32", 16},    {"U64", 32},
                                                        {"C64", 32},    {"NEW", 7}};
  for (const auto& [dtype, bytes] : dtypes) {
    write_raw(header(dtype, "[2, 2]", bytes), static_cast<size_t>(bytes) + 2);
    const SafetensorsFile read(file());
    EXPECT_TRUE(same(read.read("x"), at::zeros({2}, at::kByte))) << dtype;
    EXPECT_EQ(read.entries().at("odd").dtype, at::ScalarType::Undefined);
    EXPECT_EQ(read.entries().at("odd").dtype_name, dtype);
    for (const auto& text : {value_error([&] { read.read("odd"); }), value_error([&] {
                               read.read("odd", {{0, 0}, {1, 1}});
                             })}) {
      EXPECT_TRUE(contains(text, "tensor odd has dtype " + dtype)) << text;
      EXPECT_TRUE(contains(text, file().string()));
    }
    if (dtype == "NEW") continue;
    EXPECT_TRUE(contains(error_of(header(dtype, "[2, 4]", bytes), static_cast<size_t>(bytes) + 2), "tensor odd"));
  }
  EXPECT_TRUE(contains(error_of(header("F4", "[3]", 2), 4), "does not fit its bytes")) << "one and a half bytes";
  EXPECT_TRUE(contains(error_of(header("NEW", "[-1]", 2), 4), "does not fit its bytes"));
}

TEST_F(Safetensors, ShapesThatDontFitTheirBytes) {
  const auto error = [&](const std::string& shape, const std::string& offsets) {
    return error_of(R"({"x": {"dtype": "F32", "shape": )" + shape + R"(, "data_offsets": )" + offsets + "}}", 8);
  };
  for (const auto& text : {error("[3]", "[0, 8]"), error("[1]", "[0, 8]"), error("[-2]", "[0, 8]"),
                           error("[-1, -2]", "[0, 8]"), error("[2]", "[8, 0]"), error("[2]", "[-8, 0]"),
                           error("[4611686018427387904, 4]", "[0, 0]"), error("[]", "[0, 8]")}) {
    EXPECT_TRUE(contains(text, "tensor x") && contains(text, "does not fit its bytes")) << text;
  }
  // No bytes, but strides that no tensor can have.
  EXPECT_TRUE(contains(error("[0, 4611686018427387904, 4]", "[0, 0]"), "does not fit its bytes"));
  EXPECT_TRUE(contains(error("[4]", "[0, 16]"), "truncated: tensor x ends at byte 16"));
}

TEST_F(Safetensors, BytesThatBelongToNoneOrTwo) {
  const auto two = [](const std::string& first, const std::string& second) {
    return R"({"a": {"dtype": "U8", "shape": [4], "data_offsets": )" + first +
           R"(}, "b": {"dtype": "U8", "shape": [4], "data_offsets": )" + second + "}}";
  };
  EXPECT_TRUE(contains(error_of(two("[0, 4]", "[2, 6]"), 6), "tensor b begins at byte 2 of the data, expected 4"));
  EXPECT_TRUE(contains(error_of(two("[0, 4]", "[0, 4]"), 4), "overlap or hole"));
  EXPECT_TRUE(contains(error_of(two("[0, 4]", "[6, 10]"), 10), "tensor b begins at byte 6 of the data, expected 4"));
  EXPECT_TRUE(contains(error_of(two("[1, 5]", "[5, 9]"), 9), "tensor a begins at byte 1 of the data, expected 0"));
  EXPECT_TRUE(contains(error_of(two("[0, 4]", "[4, 8]"), 11), "3 bytes after the last tensor"));
  EXPECT_TRUE(contains(error_of(two("[0, 4]", "[4, 8]"), 7), "truncated: tensor b ends at byte 8"));
  EXPECT_TRUE(contains(error_of("{}", 1), "1 bytes after the last tensor"));
  write_raw(two("[4, 8]", "[0, 4]"), 8);  // the order of names is free
  EXPECT_EQ(value_error([&] { const SafetensorsFile opened(file()); }), "nothing thrown");
}

TEST_F(Safetensors, NamesGivenTwice) {
  const std::string entry = R"("x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]})";
  EXPECT_TRUE(contains(error_of("{" + entry + ", " + entry + "}", 4), "tensor x appears twice"));
  const auto write_error = [&](const std::vector<NamedTensor>& tensors) {
    return value_error([&] { write_safetensors(file(), tensors); });
  };
  fs::remove(file());
  EXPECT_TRUE(contains(write_error({{"x", at::ones({1})}, {"x", at::ones({1})}}), "tensor name x"));
  EXPECT_TRUE(contains(write_error({{"__metadata__", at::ones({1})}}), "__metadata__"));
  EXPECT_TRUE(contains(write_error({{"z", at::ones({1}, at::kComplexFloat)}}), "tensor z"));
  EXPECT_TRUE(fs::is_empty(folder_.path())) << "refused before anything is written";
}

TEST_F(Safetensors, FoldersThatDontExist) {
  const auto nowhere = folder_.path() / "nowhere" / "a.safetensors";
  for (const bool as_text : {false, true}) {
    std::string text = "nothing thrown";
    try {
      if (as_text) {
        megatron_cpp::write_file(nowhere, "text");
      } else {
        write_safetensors(nowhere, {{"x", at::ones({1})}});
      }
    } catch (const WriteError& error) {
      text = error.what();
    }
    EXPECT_TRUE(contains(text, "cannot write " + nowhere.string()) && contains(text, "No such file")) << text;
  }
}

TEST_F(Safetensors, WritingReplacesAWholeFile) {
  write_safetensors(file(), {{"x", at::ones({1000})}});
  const SafetensorsFile before(file());
  write_safetensors(file(), {{"y", at::zeros({2})}});
  EXPECT_TRUE(same(before.read("x"), at::ones({1000}))) << "an open reader keeps what it opened";
  EXPECT_TRUE(same(SafetensorsFile(file()).read("y"), at::zeros({2})));
  megatron_cpp::write_file(file(), "text");
  EXPECT_EQ(fs::file_size(file()), 4U);
}

TEST(CompleteFile, WhatAFailedFlushMeans) {
  for (const int reason : {EIO, ENOSPC, EDQUOT}) EXPECT_TRUE(megatron_cpp::internal::means_lost_data(reason)) << reason;
  for (const int reason : {EINVAL, ENOTSUP, ENOSYS, EBADF, EACCES, 0}) {
    EXPECT_FALSE(megatron_cpp::internal::means_lost_data(reason)) << reason;
  }
}

TEST(CompleteFile, WhenAFileThatCannotBeReplacedIsWrittenInto) {
  for (const int reason : {EBUSY, EEXIST, EXDEV, EPERM})
    EXPECT_TRUE(megatron_cpp::internal::may_write_in_place(reason));
  for (const int reason : {EIO, ENOSPC, EDQUOT, EROFS, ENOENT}) {
    EXPECT_FALSE(megatron_cpp::internal::may_write_in_place(reason)) << "the old file would be lost: " << reason;
  }
}

TEST(CompleteFile, LinksAreFollowedToTheirEnd) {
  const test_support::TemporaryFolder folder;
  const auto path = [&](const char* name) { return folder.path() / name; };
  fs::create_directory(path("below"));
  fs::create_symlink("below/file", path("one"));
  fs::create_symlink(path("one"), path("two"));
  fs::create_symlink("circle", path("circle"));
  EXPECT_EQ(megatron_cpp::internal::link_target(path("two")), path("below/file"));
  EXPECT_EQ(megatron_cpp::internal::link_target(path("plain")), path("plain"));
  EXPECT_TRUE(test_support::throws<megatron_cpp::WriteError>(
      [&] { megatron_cpp::internal::link_target(path("circle")); }, "circle"));
  megatron_cpp::write_file(path("two"), "text");
  EXPECT_EQ(test_support::read_file(path("below/file")), "text");
  EXPECT_TRUE(fs::is_symlink(path("two")) && fs::is_symlink(path("one")));
}

// The checksums are those that the program xxh128sum prints.
TEST(CompleteFile, KnowsWhatItHasWritten) {
  const test_support::TemporaryFolder folder;
  const auto file = folder.path() / "file";
  const FileDigest none{0, "99aa06d3014798d86001c324468d497f"};
  EXPECT_EQ(megatron_cpp::internal::CompleteFile(file).commit(), none);
  EXPECT_EQ(megatron_cpp::internal::digest_of_file(file), none);
  {
    megatron_cpp::internal::CompleteFile written(file);
    written.write("a", 1);
    written.write("bc", 2);
    EXPECT_EQ(written.commit(), (FileDigest{3, "06b05ab6733a618578af5f94892f3950"}));
  }
  const std::vector<NamedTensor> tensors = {{"x", at::arange(900001, at::kFloat)}};  // not a number of blocks
  const auto written = write_safetensors(file, tensors);
  EXPECT_EQ(written, megatron_cpp::internal::digest_of_file(file));
  EXPECT_EQ(written.bytes, static_cast<int64_t>(std::filesystem::file_size(file)));
}

TEST(CompleteFile, AWriterThatGivesUpLeavesTheOldFile) {
  const test_support::TemporaryFolder folder;
  const auto file = folder.write("file", "old");
  {
    megatron_cpp::internal::CompleteFile given_up(file);
    megatron_cpp::internal::CompleteFile other(file);
    given_up.write("half", 4);
    other.write("new", 3);
    EXPECT_EQ(test_support::read_file(file), "old");
    other.commit();
  }
  EXPECT_EQ(test_support::read_file(file), "new");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder.path()), {}), 1);
}

}  // namespace megatron_cpp
