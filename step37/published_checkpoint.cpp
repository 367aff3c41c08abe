#include "step37/published_checkpoint.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "megatron_cpp/checkpoint/checkpoint_folder.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/json_object.h"
#include "parallel/agree.h"
#include "step37/checkpoint_names.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr const char* kConfig = "config.json";
constexpr const char* kWeights = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kCopied[] = {"generation_config.json",
                                   "tokenizer.json",
                                   "tokenizer.model",
                                   "tokenizer_config.json",
                                   "special_tokens_map.json",
                                   "added_tokens.json",
                                   "vocab.json",
                                   "merges.txt",
                                   "chat_template.jinja",
                                   "chat_template.json",
                                   "preprocessor_config.json",
                                   "processor_config.json"};

bool is_there(const fs::path& path) {
  std::error_code unknown;
  return fs::exists(path, unknown);
}

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
    TORCH_CHECK_VALUE(megatron_cpp::internal::is_file_name(file), weight_map.where(tensor), " is \"", file,
                      "\", which is no file beside the index");
    files[file].insert(tensor);
  }
  TORCH_CHECK_VALUE(!files.empty(), path.string(), ": key weight_map is empty");
  return files;
}

at::ScalarType dtype_of_config(const std::string& name) {
  if (name == "float32") return at::kFloat;
  if (name == "float16") return at::kHalf;
  TORCH_CHECK_VALUE(name == "bfloat16", "dtype ", name, ": expected float32, float16 or bfloat16");
  return at::kBFloat16;
}

at::ScalarType dtype_of_file(const std::string& name) {
  for (const auto dtype : {at::kFloat, at::kHalf, at::kBFloat16, at::kDouble}) {
    if (safetensors_dtype(dtype, name) == name) return dtype;
  }
  TORCH_CHECK_VALUE(false, name, " is no dtype of weights");
}

/// The tensors of one file.
struct Shard {
  std::string file;
  std::vector<SafetensorsWriter::Entry> entries;
};

std::vector<Shard> shards_of(const PublishedForm& form, const PublishedTensors& tensors, at::ScalarType dtype,
                             const WritePublishedOptions& options, int64_t& total_size) {
  std::vector<Shard> shards(1);
  int64_t shard_size = 0;
  total_size = 0;
  for (const auto& [name, shape] : tensors) {
    const auto exception = form.dtypes.find(name);
    const bool has_own = options.dtype.empty() && exception != form.dtypes.end();
    const auto tensor_dtype = has_own ? dtype_of_file(exception->second) : dtype;
    int64_t bytes = static_cast<int64_t>(c10::elementSize(tensor_dtype));
    for (const int64_t size : shape) bytes *= size;
    if (shard_size > 0 && shard_size + bytes > options.max_shard_size) {
      shards.emplace_back();
      shard_size = 0;
    }
    shards.back().entries.push_back({name, tensor_dtype, shape});
    shard_size += bytes;
    total_size += bytes;
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    shards[i].file =
        shards.size() == 1 ? kWeights : fmt::format("model-{:05}-of-{:05}.safetensors", i + 1, shards.size());
  }
  return shards;
}

std::string index_of(const std::vector<Shard>& shards, int64_t total_size) {
  Json weight_map = Json::object();
  for (const auto& shard : shards) {
    for (const auto& entry : shard.entries) weight_map[entry.name] = shard.file;
  }
  return Json{{"metadata", {{"total_size", total_size}}}, {"weight_map", std::move(weight_map)}}.dump(2) + "\n";
}

}  // namespace

std::string PublishedForm::to_text() const {
  return Json{{"published",
               {{"config", Json::parse(config)},
                {"dtypes", dtypes},
                {"has_weights", has_weights},
                {"has_mtp_layers", has_mtp_layers},
                {"has_qk_norms", has_qk_norms}}}}
      .dump();
}

PublishedConfig PublishedForm::model(const fs::path& where) const {
  auto model = published_config_from_text(config, where);
  if (!has_weights) return model;
  model.text.qk_layernorm = has_qk_norms;
  if (!has_mtp_layers) model.text.mtp_layers.clear();
  return model;
}

std::optional<PublishedForm> PublishedForm::from_text(const std::string& text, const fs::path& where) {
  if (text.empty()) return std::nullopt;
  const auto json = megatron_cpp::internal::parse_json(text, where);
  const megatron_cpp::internal::JsonObject root(json, where);
  if (!root.has("published")) return std::nullopt;
  const auto published = root.object("published");
  published.object("config");  // checks that it is an object
  const auto names = published.object("dtypes");
  PublishedForm form{.config = json.at("published").at("config").dump(2),
                     .has_weights = published.boolean("has_weights"),
                     .has_mtp_layers = published.boolean("has_mtp_layers"),
                     .has_qk_norms = published.boolean("has_qk_norms")};
  for (const auto& name : names.names()) form.dtypes[name] = names.text(name);
  return form;
}

PublishedCheckpoint::PublishedCheckpoint(const fs::path& folder)
    : folder_(folder), config_(read_published_config(folder / kConfig)) {
  announced_mtp_layers_ = static_cast<int64_t>(config_.text.mtp_layers.size());
  // In this order, as transformers looks for them.
  if (is_there(folder / kWeights)) {
    open(folder / kWeights);
  } else if (is_there(folder / kIndex)) {
    for (const auto& [file, names] : files_of_index(folder / kIndex)) {
      TORCH_CHECK_VALUE(is_there(folder / file), (folder / kIndex).string(), " names ", file, ", which is not there");
      open(folder / file);
      for (const auto& name : names) {
        TORCH_CHECK_VALUE(files_.back()->contains(name), (folder / kIndex).string(), ": tensor ", name,
                          " is said to be in ", file, ", which lacks it");
      }
    }
  }
  if (has_weights()) check_tensors();
}

bool PublishedCheckpoint::is_at(const fs::path& folder) {
  return is_there(folder / kConfig) && (is_there(folder / kWeights) || is_there(folder / kIndex));
}

void PublishedCheckpoint::open(const fs::path& path) {
  auto file = std::make_shared<const SafetensorsFile>(path);
  refuse_quantised(*file);
  for (const auto& [name, entry] : file->entries()) {
    const auto [earlier, is_new] = places_.emplace(without_prefix(name), Place{file, name});
    TORCH_CHECK_VALUE(is_new, path.string(), ": tensor ", name, " is also in ", earlier->second.file->path().string(),
                      earlier->second.name == name ? "" : " as " + earlier->second.name);
  }
  files_.push_back(std::move(file));
}

void PublishedCheckpoint::check_tensors() {
  constexpr size_t kMostListed = 50;
  config_.text.qk_layernorm = std::any_of(places_.begin(), places_.end(), [](const auto& place) {
    return place.first.ends_with(".self_attn.q_norm.weight") || place.first.ends_with(".self_attn.k_norm.weight");
  });
  auto expected = published_tensors(config_);
  auto mtp = published_mtp_tensors(config_);
  const auto is_stored = [&](const auto& tensor) { return places_.contains(tensor.first); };
  if (std::any_of(mtp.begin(), mtp.end(), is_stored)) {
    expected.merge(mtp);
  } else {
    config_.text.mtp_layers.clear();
  }
  std::vector<std::string> faults;
  for (const auto& [name, shape] : expected) {
    const auto found = places_.find(name);
    if (found == places_.end()) {
      faults.push_back("missing: " + name);
      continue;
    }
    const auto& stored = entry(found->second);
    if (stored.shape != shape) {
      faults.push_back(
          c10::str(name, " has shape ", at::IntArrayRef(stored.shape), ", expected ", at::IntArrayRef(shape)));
    } else if (stored.dtype == at::ScalarType::Undefined || !at::isFloatingType(stored.dtype)) {
      faults.push_back(fmt::format("{} has dtype {}, expected a floating-point one", name, stored.dtype_name));
    }
  }
  for (const auto& [name, place] : places_) {
    if (!expected.contains(name)) faults.push_back("unexpected: " + place.name);
  }
  std::string text;
  for (size_t i = 0; i < std::min(faults.size(), kMostListed); ++i) text += "\n  " + faults[i];
  if (faults.size() > kMostListed) text += fmt::format("\n  and {} more", faults.size() - kMostListed);
  TORCH_CHECK_VALUE(faults.empty(), folder_.string(), ": the weights are not those of config.json:", text);
}

PublishedForm PublishedCheckpoint::form() const {
  PublishedForm form{.config = hub_form(folder_ / kConfig),
                     .has_weights = has_weights(),
                     .has_mtp_layers = !config_.text.mtp_layers.empty(),
                     .has_qk_norms = config_.text.qk_layernorm};
  const auto usual = safetensors_dtype(dtype_of_config(config_.dtype), "");
  for (const auto& [name, place] : places_) {
    const auto& dtype = entry(place).dtype_name;
    if (dtype != usual) form.dtypes[name] = dtype;
  }
  return form;
}

PublishedTensors PublishedCheckpoint::tensors() const {
  PublishedTensors tensors;
  for (const auto& [name, place] : places_) tensors[name] = entry(place).shape;
  return tensors;
}

at::Tensor PublishedCheckpoint::read(const std::string& published_name, const Box& box) const {
  const auto found = places_.find(published_name);
  TORCH_CHECK_VALUE(found != places_.end(), folder_.string(), ": no tensor ", published_name);
  return found->second.file->read(found->second.name, box);
}

void PublishedCheckpoint::load(const std::vector<ParameterShard>& parameters) const {
  const at::NoGradGuard no_grad;
  for (const auto& shard : parameters) {
    for (const auto& segment : shard.segments) {
      const auto name = published_name(segment.name);
      const auto found = places_.find(name);
      TORCH_CHECK_VALUE(found != places_.end(), folder_.string(), ": no tensor ", name);
      if (segment.box.numel() == 0) continue;
      found->second.file->copy_to(segment.in_local(shard.parameter), found->second.name, segment.box);
    }
  }
}

void check_new_folder(const fs::path& folder) {
  std::error_code unknown;
  if (!fs::exists(fs::symlink_status(folder, unknown))) return;
  TORCH_CHECK_VALUE(fs::is_directory(folder, unknown) && fs::is_empty(folder, unknown), folder.string(),
                    " exists and is not an empty folder");
}

void copy_tokenizer_files(const fs::path& from, const fs::path& to) {
  for (const auto* name : kCopied) {
    if (is_there(from / name)) fs::copy_file(from / name, to / name, fs::copy_options::overwrite_existing);
  }
}

void write_published_checkpoint(const fs::path& folder, const PublishedForm& form, const PublishedTensors& tensors,
                                const std::function<at::Tensor(const std::string&)>& read, const fs::path& copied,
                                const parallel::GroupPtr& world, const WritePublishedOptions& options) {
  const bool is_first = world->getRank() == 0;
  // "DIR/" has an empty file name.
  const auto target = folder.has_filename() ? folder : folder.parent_path();
  const auto partial = megatron_cpp::internal::partial_of(target);
  std::vector<Shard> shards;
  int64_t total_size = 0;
  std::string config;
  parallel::agree_on(
      [&] {
        TORCH_CHECK_VALUE(options.max_shard_size > 0, "the largest size of a file, ", options.max_shard_size,
                          " bytes, is not positive");
        config = form.config;
        if (!options.dtype.empty()) config = with_dtype(config, options.dtype);
        const auto dtype = dtype_of_config(published_config_from_text(config, folder / kConfig).dtype);
        shards = shards_of(form, tensors, dtype, options, total_size);
        if (!is_first) return;
        check_new_folder(target);
        fs::remove_all(partial);
        fs::create_directories(partial);
      },
      world);
  parallel::agree_on(
      [&] {
        for (size_t i = 0; i < shards.size(); ++i) {
          if (static_cast<int>(i) % world->getSize() != world->getRank()) continue;
          SafetensorsWriter writer(partial / shards[i].file, shards[i].entries, {{"format", "pt"}});
          for (const auto& entry : shards[i].entries) writer.write(read(entry.name).to(entry.dtype));
          writer.commit();
        }
      },
      world);
  parallel::agree_on(
      [&] {
        if (!is_first) return;
        if (!copied.empty()) copy_tokenizer_files(copied, partial);
        write_file(partial / kConfig, config + "\n");
        for (const auto& [name, text] : options.files) write_file(partial / name, text + "\n");
        if (shards.size() > 1) write_file(partial / kIndex, index_of(shards, total_size));
        megatron_cpp::internal::flush_folder(partial);
        megatron_cpp::internal::move_into_place(partial, target);
      },
      world);
}

}  // namespace megatron_cpp::step37
