// The file in which a published checkpoint says how its pictures are cut.
#pragma once

#include <filesystem>
#include <string>

#include "step37/data/crop_plan.h"

namespace megatron_cpp::step37 {

inline constexpr const char* kPreprocessorConfig = "preprocessor_config.json";

/// How pictures of the checkpoint in `folder` are cut: sides from its preprocessor_config.json (size.height,
/// patch_size, max_image_size, as transformers' Step3p7ImageProcessor has them); `enable_patch`: false, which
/// transformers doesn't know, means no crops. What it doesn't say is as released, in proportion to image_size.
/// @throws c10::ValueError naming file and key, or what CropOptions::validate refuses.
CropOptions read_preprocessor_config(const std::filesystem::path& folder, int64_t image_size,
                                     int64_t vision_patch_size);

/// The text of a preprocessor_config.json from which the same is read.
std::string preprocessor_config(const CropOptions& crops);

}  // namespace megatron_cpp::step37
