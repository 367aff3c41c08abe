#include "step37/data/preprocessor_config.h"

#include <algorithm>
#include <cstdint>
#include <nlohmann/json.hpp>

#include "megatron_cpp/checkpoint/json_object.h"

namespace megatron_cpp::step37 {

CropOptions read_preprocessor_config(const std::filesystem::path& folder, int64_t image_size,
                                     int64_t vision_patch_size) {
  const auto file = folder / kPreprocessorConfig;
  const auto json = exists(file) ? megatron_cpp::internal::read_json_file(file) : nlohmann::ordered_json::object();
  const megatron_cpp::internal::JsonObject processor(json, file);
  CropOptions crops;
  crops.vision_patch_size = vision_patch_size;
  crops.global_side = processor.has_value("size") ? processor.object("size").integer("height") : image_size;
  // The released model's proportion of 504 to 728, in whole patches.
  const int64_t crop_patches = (18 * (crops.global_side / vision_patch_size) + 13) / 26;
  crops.crop_side = processor.has_value("patch_size") ? processor.integer("patch_size")
                                                      : std::max<int64_t>(crop_patches, 1) * vision_patch_size;
  if (processor.has_value("max_image_size")) crops.max_side = processor.integer("max_image_size");
  if (processor.has_value("enable_patch")) crops.with_crops = processor.boolean("enable_patch");
  crops.validate();
  return crops;
}

std::string preprocessor_config(const CropOptions& crops) {
  nlohmann::ordered_json json = {{"image_processor_type", "Step3p7ImageProcessor"},
                                 {"size", {{"height", crops.global_side}, {"width", crops.global_side}}},
                                 {"patch_size", crops.crop_side},
                                 {"max_image_size", crops.max_side},
                                 {"vision_patch_size", crops.vision_patch_size}};
  if (!crops.with_crops) json["enable_patch"] = false;
  return json.dump(2);
}

}  // namespace megatron_cpp::step37
