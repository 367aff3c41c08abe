// A folder of captioned pictures for a small run.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "tests/support/stb_image_write.h"
#include "tests/support/temporary_folder.h"

namespace megatron_cpp::small_run {

inline void write_picture(const std::filesystem::path& path, int width, int height, int seed) {
  std::vector<unsigned char> pixels;
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      for (int channel = 0; channel < 3; ++channel) {
        pixels.push_back(static_cast<unsigned char>((x * (seed + 1) + y * (channel + 2) + 37 * seed) % 256));
      }
    }
  }
  EXPECT_NE(stbi_write_png(path.c_str(), width, height, 3, pixels.data(), 3 * width), 0);
}

/// Twelve captioned pictures; the larger ones are cut into crops.
inline void write_pictures(const std::filesystem::path& folder) {
  std::filesystem::create_directories(folder);
  const std::vector<std::string> things = {"red ball", "blue bird", "green tree", "red bird"};
  for (int i = 0; i < 12; ++i) {
    const auto name = "picture" + std::to_string(i);
    write_picture(folder / (name + ".png"), 40 + 7 * (i % 5), 44 + 9 * (i % 4), i);
    test_support::write_file(folder / (name + ".txt"),
                             (i % 2 == 0 ? "A " : "The other ") + things[static_cast<size_t>(i % 4)] + ".\n");
  }
}

}  // namespace megatron_cpp::small_run
