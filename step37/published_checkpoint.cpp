#include "step37/published_checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <system_error>

#include "megatron_cpp/checkpoint/json_object.h"
#include "step37/checkpoint_names.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;

constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

/// Some checkpoints put a prefix before the vision parts.
std::string without_prefix(const std::string& name) {
  constexpr std::string_view kPrefix = "model.";
  for (const std::string_view part : {"model.vision_model.", "model.vit_large_projector."}) {
    if (name.starts_with(part)) return name.substr(kPrefix.size());
  }
  return name;
}

void refuse_quantised(const SafetensorsFile& file) {
  for (const auto& [name, entry] : file.entries()) {
    const bool is_scale = name.ends_with("weight_scale_inv") || name.ends_with("weight_scale") ||
                          name.ends_with("weight_scale_2") || name.ends_with("input_scale");
    TORCH_CHECK_VALUE(!is_scale && !entry.dtype_name.starts_with("F8_") && !entry.dtype_name.starts_with("F4"),
                      file.path().string(), ": tensor ", name, " of dtype ", entry.dtype_name,
                      " belongs to a quantised checkpoint, such as the FP8 and NVFP4 releases: only float32, float16 "
                      "and bfloat16 weights can be read");
  }
}

/// The files that an index names, with the tensors in each.
std::map<std::string, std::set<std::string>> files_of_index(const fs::path& path) {
  const auto json = megatron_cpp::internal::read_json_file(path);
  const auto weight_map = megatron_cpp::internal::JsonObject(json, path).object("weight_map");
  std::map<std::string, std::set<std::string>> files;
  for (const auto& tensor : weight_map.names()) {
    const auto file = weight_map.text(tensor);
    TORCH_CHECK_VALUE(!file.empty() && fs::path(file).filename() == file && file != "." && file != "..",
                      weight_map.where(tensor), " is \"", file, "\", which is no file beside the index");
    files[file].insert(tensor);
  }
  TORCH_CHECK_VALUE(!files.empty(), path.string(), ": key weight_map is empty");
  return files;
}

std::vector<std::string> mtp_tensors(int64_t layer, bool has_qk_norm) {
  std::vector<std::string> names = {"enorm.weight",
                                    "hnorm.weight",
                                    "eh_proj.weight",
                                    "transformer.shared_head.norm.weight",
                                    "transformer.shared_head.output.weight",
                                    "input_layernorm.weight",
                                    "post_attention_layernorm.weight",
                                    "self_attn.q_proj.weight",
                                    "self_attn.k_proj.weight",
                                    "self_attn.v_proj.weight",
                                    "self_attn.o_proj.weight",
                                    "self_attn.g_proj.weight",
                                    "mlp.gate_proj.weight",
                                    "mlp.up_proj.weight",
                                    "mlp.down_proj.weight"};
  if (has_qk_norm) names.insert(names.end(), {"self_attn.q_norm.weight", "self_attn.k_norm.weight"});
  for (auto& name : names) name = fmt::format("model.layers.{}.{}", layer, name);
  return names;
}

/// Whether a tensor belongs to a layer behind the decoder's.
bool is_of_mtp_layer(const std::string& name, const PublishedConfig& config) {
  const auto decoder_layers = config.text.num_layers();
  for (int64_t layer = decoder_layers; layer < decoder_layers + static_cast<int64_t>(config.mtp_layers.size());
       ++layer) {
    if (name.starts_with(fmt::format("model.layers.{}.", layer))) return true;
  }
  return false;
}

}  // namespace

PublishedCheckpoint::PublishedCheckpoint(const fs::path& folder)
    : folder_(folder), config_(read_published_config(folder / "config.json")) {
  std::error_code unknown;
  // In this order, as transformers looks for them.
  if (fs::exists(folder / kWeights, unknown)) {
    open(folder / kWeights);
  } else if (fs::exists(folder / kIndex, unknown)) {
    for (const auto& [file, names] : files_of_index(folder / kIndex)) {
      TORCH_CHECK_VALUE(fs::exists(folder / file, unknown), (folder / kIndex).string(), " names ", file,
                        ", which is not there");
      open(folder / file);
      for (const auto& name : names) {
        TORCH_CHECK_VALUE(files_.back()->contains(name), (folder / kIndex).string(), ": tensor ", name,
                          " is said to be in ", file, ", which lacks it");
      }
    }
  }
  if (!has_weights()) return;
  config_.text.qk_layernorm = std::any_of(tensors_.begin(), tensors_.end(), [](const auto& entry) {
    return entry.first.ends_with(".self_attn.q_norm.weight") || entry.first.ends_with(".self_attn.k_norm.weight");
  });
  check_mtp_layers();
}

void PublishedCheckpoint::open(const fs::path& path) {
  auto file = std::make_shared<const SafetensorsFile>(path);
  refuse_quantised(*file);
  for (const auto& [name, entry] : file->entries()) {
    const auto [earlier, is_new] = tensors_.emplace(without_prefix(name), Place{file, name});
    TORCH_CHECK_VALUE(is_new, path.string(), ": tensor ", name, " is also in ", earlier->second.file->path().string(),
                      earlier->second.name == name ? "" : " as " + earlier->second.name);
  }
  files_.push_back(std::move(file));
}

void PublishedCheckpoint::check_mtp_layers() {
  size_t found = 0;
  std::string missing;
  for (size_t i = 0; i < config_.mtp_layers.size(); ++i) {
    for (const auto& name :
         mtp_tensors(config_.text.num_layers() + static_cast<int64_t>(i), config_.text.qk_layernorm)) {
      if (tensors_.contains(name)) {
        ++found;
      } else if (missing.empty()) {
        missing = name;
      }
    }
  }
  TORCH_CHECK_VALUE(found == 0 || missing.empty(), folder_.string(),
                    ": the multi-token-prediction layers are there in part: there is no tensor ", missing);
  has_mtp_weights_ = found > 0;
}

void PublishedCheckpoint::load(const std::vector<ParameterShard>& parameters) const {
  constexpr size_t kMostListed = 50;
  std::vector<std::string> faults;
  std::set<std::string> wanted;
  for (const auto& shard : parameters) {
    for (const auto& segment : shard.segments) {
      const auto name = published_name(segment.name);
      wanted.insert(name);
      const auto found = tensors_.find(name);
      if (found == tensors_.end()) {
        faults.push_back("missing: " + name);
        continue;
      }
      const auto& entry = found->second.file->entries().at(found->second.name);
      if (entry.shape != segment.global_shape) {
        faults.push_back(c10::str(name, " has shape ", at::IntArrayRef(entry.shape), ", expected ",
                                  at::IntArrayRef(segment.global_shape)));
      } else if (entry.dtype == at::ScalarType::Undefined || !at::isFloatingType(entry.dtype)) {
        faults.push_back(fmt::format("{} has dtype {}, expected a floating-point one", name, entry.dtype_name));
      }
    }
  }
  for (const auto& [name, place] : tensors_) {
    if (!wanted.contains(name) && !is_of_mtp_layer(name, config_)) faults.push_back("unexpected: " + place.name);
  }
  std::string text;
  for (size_t i = 0; i < std::min(faults.size(), kMostListed); ++i) text += "\n  " + faults[i];
  if (faults.size() > kMostListed) text += fmt::format("\n  and {} more", faults.size() - kMostListed);
  TORCH_CHECK_VALUE(faults.empty(), folder_.string(), ": the weights are not those of config.json:", text);

  const at::NoGradGuard no_grad;
  for (const auto& shard : parameters) {
    for (const auto& segment : shard.segments) {
      if (segment.box.numel() == 0) continue;
      const auto& place = tensors_.at(published_name(segment.name));
      place.file->copy_to(segment.in_local(shard.parameter), place.name, segment.box);
    }
  }
}

}  // namespace megatron_cpp::step37
