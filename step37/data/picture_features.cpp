#include "step37/data/picture_features.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "megatron_cpp/checkpoint/checksum.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/json_object.h"
#include "parallel/collectives.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/utf8.h"
#include "step37/published_checkpoint.h"

namespace megatron_cpp::step37 {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int64_t kFormatVersion = 1;
constexpr std::string_view kChunkBegin = "chunk-";
constexpr std::string_view kChunkEnd = ".safetensors";

fs::path manifest_of(const fs::path& folder) { return folder / "features.json"; }

/// Keys of a configuration and their values.
std::vector<std::pair<std::string, std::string>> texts_of(const FeatureSource& source) {
  const auto& [vision, crops, precision] = source;
  return {{"vision.image_size", fmt::to_string(vision.image_size)},
          {"vision.patch_size", fmt::to_string(vision.patch_size)},
          {"vision.width", fmt::to_string(vision.width)},
          {"vision.layers", fmt::to_string(vision.layers)},
          {"vision.heads", fmt::to_string(vision.heads)},
          {"vision.mlp_width", fmt::to_string(vision.mlp_width)},
          {"vision.layer_norm_eps", fmt::to_string(vision.layer_norm_eps)},
          {"vision.rope_theta", fmt::to_string(vision.rope_theta)},
          {"data.crops", fmt::to_string(crops.with_crops)},
          {"data.crop_side", fmt::to_string(crops.crop_side)},
          {"data.max_side", fmt::to_string(crops.max_side)},
          {"training.precision", precision == at::kFloat ? "float32" : "bfloat16"}};
}

/// What features.json says: the keys of the source with their values, and the tower's checksum.
struct FeatureManifest {
  std::map<std::string, std::string> source;
  std::string tower_checksum;
};

std::string to_text(const FeatureSource& source, const std::string& tower_checksum) {
  Json keys = Json::object();
  for (const auto& [key, value] : texts_of(source)) keys[key] = value;
  const Json json{{"format_version", kFormatVersion},
                  {"library_version", MCPP_VERSION},
                  {"dtype", "bfloat16"},
                  {"source", std::move(keys)},
                  {"tower_xxh128", tower_checksum}};
  return json.dump(1) + "\n";
}

FeatureManifest read_feature_manifest(const fs::path& folder) {
  const auto file = manifest_of(folder);
  std::error_code unknown;
  TORCH_CHECK_VALUE(fs::exists(file, unknown), printable(folder.string()),
                    " has no features.json: `step37 features` makes such a folder");
  const auto json = megatron_cpp::internal::read_json_file(file);
  const megatron_cpp::internal::JsonObject root(json, file);
  const auto version = root.integer("format_version");
  TORCH_CHECK_VALUE(version == kFormatVersion, file.string(), " is of format version ", version,
                    ", written by megatron_cpp ", root.text("library_version"), "; this one, ", MCPP_VERSION,
                    ", reads ", kFormatVersion);
  FeatureManifest manifest;
  const auto keys = root.object("source");
  for (const auto& key : keys.names()) manifest.source[key] = keys.text(key);
  manifest.tower_checksum = root.text("tower_xxh128");
  return manifest;
}

void check_source(const fs::path& folder, const FeatureManifest& manifest, const FeatureSource& source) {
  for (const auto& [key, value] : texts_of(source)) {
    const auto found = manifest.source.find(key);
    const auto there = found == manifest.source.end() ? "unknown" : found->second;
    TORCH_CHECK_VALUE(there == value, "the features in ", printable(folder.string()),
                      " are not of this configuration's vision tower and pictures: ", key, " is ", there,
                      " there, here ", value);
  }
}

void check_checksum(const fs::path& folder, const std::string& there, const std::string& here) {
  TORCH_CHECK_VALUE(there == here, "the features in ", printable(folder.string()),
                    " are of a vision tower with other weights: their checksum is ", there, " there, here ", here);
}

/// The number in the name of a chunk; nullopt: it is none.
std::optional<int64_t> chunk_number(const std::string& name) {
  if (!name.starts_with(kChunkBegin) || !name.ends_with(kChunkEnd)) return std::nullopt;
  int64_t number = 0;
  const auto [end, error] = std::from_chars(name.data() + kChunkBegin.size(), name.data() + name.size(), number);
  return error == std::errc() && *end == '-' ? std::optional(number) : std::nullopt;
}

/// The files of the chunks, by their numbers, then by name.
std::vector<std::pair<int64_t, fs::path>> chunks_in(const fs::path& folder) {
  std::vector<std::pair<int64_t, fs::path>> chunks;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (const auto number = chunk_number(entry.path().filename().string())) chunks.emplace_back(*number, entry.path());
  }
  std::ranges::sort(chunks);
  return chunks;
}

std::string metadata_text(const PictureReference& picture) {
  const auto [bytes, modified] = file_stamp(picture);
  const Json json{{"width", picture.width}, {"height", picture.height}, {"bytes", bytes}, {"modified", modified}};
  return json.dump();
}

StoredFeatures stored_features(size_t chunk, const SafetensorsFile& file, const std::string& name) {
  const auto found = file.metadata().find(name);
  TORCH_CHECK_VALUE(found != file.metadata().end(), file.path().string(), ": its metadata lack ", printable(name));
  const auto json = megatron_cpp::internal::parse_json(found->second, file.path());
  const megatron_cpp::internal::JsonObject picture(json, file.path());
  return {chunk,
          {picture.integer("width"), picture.integer("height")},
          {picture.integer("bytes"), picture.integer("modified")}};
}

}  // namespace

std::string PictureNames::name_of(const PictureReference& picture) const {
  const auto path = fs::path(picture.path).lexically_normal();
  std::string data_set;
  auto inside = path;
  size_t shortest = std::string::npos;
  for (const auto& [name, folder] : folders_) {
    const auto relative = path.lexically_relative(folder.lexically_normal());
    if (relative.empty() || *relative.begin() == ".." || relative.native().size() >= shortest) continue;
    data_set = name;
    inside = relative;
    shortest = relative.native().size();
  }
  auto name = data_set + ":";
  const bool is_text = is_utf8(inside.native());
  for (const char byte : inside.native()) {
    const bool is_plain = byte != '%' && byte != '#' && (is_text || static_cast<unsigned char>(byte) < 0x80);
    name += is_plain ? std::string(1, byte) : fmt::format("%{:02X}", static_cast<unsigned char>(byte));
  }
  const auto& place = picture.place;
  return place.bytes == 0 ? name : name + fmt::format("#{}+{}", place.offset, place.bytes);
}

std::string tower_checksum(const VisionTowerImpl& tower, const parallel::GroupPtr& tp) {
  const c10::NoGradGuard no_grad;
  tower.use_parameters();
  megatron_cpp::internal::Checksum checksum;
  for (const auto& shard : tower.own_parameters()) {
    auto values = shard.parameter.to(at::kCPU, at::kFloat).contiguous();
    const auto& first = shard.segments.front();
    if (!shard.domain.sharded_over.empty()) {
      auto whole = at::zeros(first.global_shape, at::kFloat);
      for (const auto& segment : shard.segments) segment.in_global(whole).copy_(segment.in_local(values));
      // As integers, so that no bit changes: every element is 0 on all ranks but one.
      auto bits = whole.view(at::kInt);
      parallel::all_reduce_in_place(bits, tp);
      values = whole;
    }
    checksum.add(first.name.data(), first.name.size() + 1);
    checksum.add(values.const_data_ptr(), values.nbytes());
  }
  return checksum.text();
}

FileStamp file_stamp(const PictureReference& picture) {
  std::error_code error;
  if (picture.place.bytes > 0) return {};
  const auto bytes = static_cast<int64_t>(fs::file_size(picture.path, error));
  return error ? FileStamp{} : FileStamp{bytes, modification_time(picture.path)};
}

int64_t num_feature_rows(const PictureReference& picture, const CropOptions& crops) {
  return plan_crops(picture.width, picture.height, crops).num_crops() * crops.crop_tokens() + crops.global_tokens();
}

PictureFeatures::PictureFeatures(fs::path folder, PictureNames names, const FeatureSource& source)
    : folder_(std::move(folder)), names_(std::move(names)), source_(source) {
  const auto manifest = read_feature_manifest(folder_);
  check_source(folder_, manifest, source);
  tower_checksum_ = manifest.tower_checksum;
  for (const auto& [number, path] : chunks_in(folder_)) {
    const auto& file = chunks_.emplace_back(path);
    for (const auto& [name, entry] : file.entries()) {
      TORCH_CHECK_VALUE(entry.shape.size() == 2 && entry.shape[1] == channels(), path.string(), ": tensor ",
                        printable(name), " has shape ", at::IntArrayRef(entry.shape), ", expected rows of ", channels(),
                        " channels");
      pictures_.insert_or_assign(name, stored_features(chunks_.size() - 1, file, name));
    }
  }
}

void PictureFeatures::check_tower(const std::string& checksum) const {
  check_checksum(folder_, tower_checksum_, checksum);
}

const StoredFeatures* PictureFeatures::find(const PictureReference& picture) const {
  const auto found = pictures_.find(names_.name_of(picture));
  return found == pictures_.end() ? nullptr : &found->second;
}

void PictureFeatures::read(const PictureReference& picture, const at::Tensor& crops,
                           const at::Tensor& global_view) const {
  const auto name = names_.name_of(picture);
  const auto found = pictures_.find(name);
  TORCH_CHECK_VALUE(found != pictures_.end(), printable(folder_.string()), " lacks the features of ", printable(name),
                    ": ", remedy());
  const auto& file = chunks_[found->second.chunk];
  const auto rows = file.entries().at(name).shape[0];
  const auto of_crops = crops.flatten(0, 1);
  const auto expected = of_crops.size(0) + global_view.size(0);
  const auto& size = found->second.size;
  TORCH_CHECK_VALUE(rows == expected, printable(folder_.string()), " has features of ", printable(name), " as ",
                    size.width, " x ", size.height, " pixels, which it isn't any more (", picture.width, " x ",
                    picture.height, "): ", remedy());
  const auto copy = [&](const at::Tensor& target, int64_t begin) {
    if (target.size(0) == 0) return;
    file.copy_to(target, name, {{begin, 0}, {target.size(0), channels()}});
  };
  copy(of_crops, 0);
  copy(global_view, of_crops.size(0));
}

std::string PictureFeatures::remedy() const {
  return fmt::format("`step37 features` with this configuration and --output {} adds what is missing",
                     printable(folder_.string()));
}

std::string PictureFeatures::printable_name(const PictureReference& picture) const {
  return printable(names_.name_of(picture));
}

void begin_feature_folder(const fs::path& folder, const FeatureSource& source, const std::string& tower_checksum) {
  std::error_code unknown;
  if (fs::exists(manifest_of(folder), unknown)) {
    const auto manifest = read_feature_manifest(folder);
    check_source(folder, manifest, source);
    check_checksum(folder, manifest.tower_checksum, tower_checksum);
  } else {
    check_new_folder(folder);
    std::error_code error;
    fs::create_directories(folder, error);
    if (error) throw WriteError(fmt::format("cannot make {}: {}", printable(folder.string()), error.message()));
    write_file(manifest_of(folder), to_text(source, tower_checksum));
  }
}

void remove_unfinished_chunks(const fs::path& folder) {
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const auto name = entry.path().filename().string();
    if (name.starts_with(kChunkBegin) && name.ends_with(".partial")) fs::remove(entry.path(), ignored);
  }
}

int64_t next_feature_chunk(const fs::path& folder) {
  const auto chunks = chunks_in(folder);
  return chunks.empty() ? 0 : chunks.back().first + 1;
}

int64_t write_feature_chunk(const fs::path& folder, int64_t number, int rank, const PictureNames& names,
                            const FeatureSource& source, const std::vector<PictureReference>& pictures,
                            const std::function<at::Tensor()>& next) {
  std::vector<SafetensorsWriter::Entry> entries;
  std::map<std::string, std::string> metadata;
  for (const auto& picture : pictures) {
    const auto name = names.name_of(picture);
    entries.push_back({name, at::kBFloat16, {num_feature_rows(picture, source.crops), source.vision.output_dim()}});
    metadata[name] = metadata_text(picture);
  }
  const auto file = fmt::format("{}{:05}-rank-{:04}{}", kChunkBegin, number, rank, kChunkEnd);
  SafetensorsWriter writer(folder / file, std::move(entries), metadata);
  for (size_t i = 0; i < pictures.size(); ++i) writer.write(next().to(at::kBFloat16));
  return writer.commit().bytes;
}

}  // namespace megatron_cpp::step37
