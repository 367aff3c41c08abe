#include "megatron_cpp/checkpoint/checkpoint_manifest.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <utility>

#include "megatron_cpp/checkpoint/checksum.h"
#include "megatron_cpp/checkpoint/complete_file.h"
#include "megatron_cpp/checkpoint/json_integer.h"
#include "megatron_cpp/checkpoint/json_object.h"
#include "megatron_cpp/checkpoint/safetensors.h"

namespace megatron_cpp::internal {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

/// Version 3 has checksums and the library's version, 2 parts of any form and the roles of tensors; version 1 had only
/// rows of one dimension.
constexpr int64_t kFormatVersion = 3;

constexpr std::string_view kChecksumBegin = ",\n \"checksum\": \"";
constexpr std::string_view kChecksumEnd = "\"\n}\n";
constexpr size_t kChecksumDigits = 32;

constexpr std::array<std::pair<TensorRole, const char*>, 3> kRoles = {
    {{TensorRole::kParameter, "parameter"}, {TensorRole::kExpAvg, "exp_avg"}, {TensorRole::kExpAvgSq, "exp_avg_sq"}}};

/// Refuses pieces that leave an element of the tensor out or hold it twice.
void check_pieces(const TensorId& id, const CheckpointTensor& tensor) {
  const auto tensor_text = c10::str("tensor ", id.text(), " of shape ", at::IntArrayRef(tensor.shape));
  TORCH_CHECK_VALUE(product_of_sizes(tensor.shape, 1).has_value(), tensor_text, ": no tensor has such a shape");
  std::vector<Box> boxes;
  std::vector<const CheckpointPiece*> origins;  // of the boxes
  for (const auto& piece : tensor.pieces) {
    TORCH_CHECK_VALUE(piece.part.is_in(tensor.shape) && piece.part.numel() > 0, tensor_text, " has no part ",
                      piece.part.text(), ", said to be in ", piece.file);
    for (auto& box : piece.part.boxes()) {
      boxes.push_back(std::move(box));
      origins.push_back(&piece);
    }
  }
  const auto fault = find_cover_fault(tensor.shape, boxes);
  if (!fault) return;
  const at::IntArrayRef element(fault->element);
  TORCH_CHECK_VALUE(fault->kind != CoverFault::Kind::kTwice, tensor_text, ": element ", element,
                    " is in two pieces, in ", origins[fault->first]->file, " and ", origins[fault->second]->file);
  TORCH_CHECK_VALUE(false, tensor_text, ": element ", element, " is in no piece");
}

Json part_json(const TensorPart& part) {
  Json json = {{"begin", part.box.begin}, {"length", part.box.length}};
  if (part.elements) json["elements"] = {part.elements->begin, part.elements->end};
  return json;
}

Json manifest_json(const CheckpointManifest& manifest) {
  Json tensors = Json::array();
  for (const auto& [id, tensor] : manifest.tensors) {
    Json pieces = Json::array();
    for (const auto& piece : tensor.pieces) {
      pieces.push_back({{"file", piece.file}, {"key", piece.key}});
      pieces.back().update(part_json(piece.part));
    }
    tensors.push_back({{"name", id.name},
                       {"role", role_text(id.role)},
                       {"dtype", tensor.dtype},
                       {"shape", tensor.shape},
                       {"pieces", std::move(pieces)}});
  }
  Json configuration = Json::object();
  for (const auto& [key, value] : manifest.configuration) configuration[key] = value;
  Json files = Json::object();
  for (const auto& [name, digest] : manifest.files) {
    files[name] = {{"bytes", digest.bytes}, {"xxh128", digest.checksum}};
  }
  return {{"format_version", kFormatVersion},
          {"library_version", manifest.library_version},
          {"step", manifest.step},
          {"configuration", std::move(configuration)},
          {"state", manifest.state},
          {"model", manifest.model},
          {"tokenizer", manifest.tokenizer},
          {"files", std::move(files)},
          {"tensors", std::move(tensors)}};
}

bool is_checksum(std::string_view text) {
  return text.size() == kChecksumDigits && text.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

/// Whether the last line of the manifest is a checksum; refuses one that isn't that of the text before it. Comes before
/// anything is made of the text, since any bit of it may have changed.
bool check_own_checksum(std::string_view text, const fs::path& file) {
  constexpr size_t kLength = kChecksumBegin.size() + kChecksumDigits + kChecksumEnd.size();
  if (text.size() < kLength) return false;
  const auto line = text.substr(text.size() - kLength);
  const auto expected = line.substr(kChecksumBegin.size(), kChecksumDigits);
  if (!line.starts_with(kChecksumBegin) || !line.ends_with(kChecksumEnd) || !is_checksum(expected)) return false;
  const auto found = checksum_of(text.substr(0, text.size() - kLength));
  TORCH_CHECK_VALUE(found == expected, file.string(), " is damaged: its checksum is ", found, ", its last line says ",
                    expected);
  return true;
}

CheckpointConfiguration parse_configuration(const JsonObject& root) {
  CheckpointConfiguration configuration;
  const auto object = root.object("configuration");
  for (const auto& key : object.names()) configuration.emplace_back(key, object.text(key));
  return configuration;
}

/// Version 3 of the key files.
FileDigest parse_digest(const JsonObject& files, const std::string& name) {
  const auto object = files.object(name);
  const FileDigest digest{object.integer("bytes"), object.text("xxh128")};
  TORCH_CHECK_VALUE(is_checksum(digest.checksum), object.where("xxh128"), " is no checksum of ", kChecksumDigits,
                    " hexadecimal digits");
  return digest;
}

TensorRole parse_role(const JsonObject& object) {
  const auto text = object.text("role");
  for (const auto& [role, known] : kRoles) {
    if (text == known) return role;
  }
  TORCH_CHECK_VALUE(false, object.where("role"), " is ", text, ", expected parameter, main, exp_avg or exp_avg_sq");
}

TensorPart parse_part(const JsonObject& object) {
  TensorPart part{.box = {object.integers("begin"), object.integers("length")}};
  TORCH_CHECK_VALUE(part.box.begin.size() == part.box.length.size(), object.where("begin"), " and length have ",
                    part.box.begin.size(), " and ", part.box.length.size(), " numbers");
  if (!object.has("elements")) return part;
  const auto elements = object.integers("elements");
  TORCH_CHECK_VALUE(elements.size() == 2, object.where("elements"), " has ", elements.size(), " numbers, expected 2");
  part.elements = {elements[0], elements[1]};
  return part;
}

using NamedTensors = std::map<TensorId, CheckpointTensor>;

NamedTensors parse_tensors(const JsonObject& root) {
  NamedTensors tensors;
  for (const auto& object : root.objects("tensors")) {
    const TensorId id{object.text("name"), parse_role(object)};
    CheckpointTensor tensor{object.text("dtype"), object.integers("shape"), {}};
    for (const auto& piece : object.objects("pieces")) {
      tensor.pieces.push_back({piece.text("file"), piece.text("key"), parse_part(piece)});
    }
    TORCH_CHECK_VALUE(tensors.emplace(id, std::move(tensor)).second, object.where("name"), ": tensor ", id.text(),
                      " is there twice");
  }
  return tensors;
}

/// Version 1 used LibTorch's names of dtypes.
std::string dtype_of_version_1(const std::string& name) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                           at::kChar, at::kByte, at::kBool}) {
    if (name == c10::toString(dtype)) return safetensors_dtype(dtype, name);
  }
  return name;
}

/// Version 1 marked the moments by a prefix of the name.
TensorId id_of_version_1(const std::string& name) {
  constexpr std::array<std::pair<std::string_view, TensorRole>, 2> kPrefixes = {
      {{"optimizer.exp_avg.", TensorRole::kExpAvg}, {"optimizer.exp_avg_sq.", TensorRole::kExpAvgSq}}};
  for (const auto& [prefix, role] : kPrefixes) {
    if (name.starts_with(prefix)) return {name.substr(prefix.size()), role};
  }
  return {name};
}

NamedTensors parse_tensors_of_version_1(const JsonObject& root) {
  NamedTensors tensors;
  const auto objects = root.object("tensors");
  for (const auto& name : objects.names()) {
    const auto object = objects.object(name);
    CheckpointTensor tensor{dtype_of_version_1(object.text("dtype")), object.integers("shape"), {}};
    for (const auto& piece : object.objects("pieces")) {
      const auto dim = piece.integer("dim");
      TORCH_CHECK_VALUE(dim >= 0 && dim < static_cast<int64_t>(tensor.shape.size()), piece.where("dim"), " is ", dim,
                        ", tensor ", name, " has shape ", at::IntArrayRef(tensor.shape));
      auto box = Box::whole(tensor.shape);
      box.begin[static_cast<size_t>(dim)] = piece.integer("begin");
      box.length[static_cast<size_t>(dim)] = piece.integer("length");
      tensor.pieces.push_back({piece.text("file"), name, {std::move(box)}});
    }
    tensors.emplace(id_of_version_1(name), std::move(tensor));
  }
  return tensors;
}

}  // namespace

std::string role_text(TensorRole role) {
  for (const auto& [known, text] : kRoles) {
    if (known == role) return text;
  }
  TORCH_INTERNAL_ASSERT(false);
}

std::string stored_name(const TensorId& id, const TensorPart& part) {
  return fmt::format("{}/{}{}", role_text(id.role), id.name, part.text());
}

std::map<std::string, std::string> file_metadata(const CheckpointManifest& manifest) {
  std::map<std::string, std::string> metadata = {{"format", fmt::format("megatron_cpp checkpoint {}", kFormatVersion)}};
  for (const auto& [id, tensor] : manifest.tensors) {
    for (const auto& piece : tensor.pieces) {
      Json json = {{"name", id.name}, {"role", role_text(id.role)}, {"dtype", tensor.dtype}, {"shape", tensor.shape}};
      json.update(part_json(piece.part));
      metadata[piece.key] = json.dump();
    }
  }
  return metadata;
}

std::string to_text(const CheckpointManifest& manifest) { return manifest_json(manifest).dump(); }

std::string file_text(const CheckpointManifest& manifest) {
  return with_checksum(manifest_json(manifest).dump(/*indent=*/1));
}

std::string with_checksum(std::string json) {
  json.resize(json.size() - std::string_view("\n}").size());
  const auto checksum = checksum_of(json);
  return json.append(kChecksumBegin).append(checksum).append(kChecksumEnd);
}

CheckpointManifest merge_manifests(const std::vector<std::string>& parts) {
  CheckpointManifest manifest;
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    const auto json = Json::parse(parts[rank]);
    const fs::path origin = fmt::format("the list of rank {}", rank);
    const JsonObject part(json, origin);
    const auto step = part.integer("step");
    if (rank == 0) {
      manifest = {.step = step,
                  .state = part.text("state"),
                  .model = part.text("model"),
                  .tokenizer = part.text("tokenizer"),
                  .configuration = parse_configuration(part),
                  .library_version = part.text("library_version"),
                  .files = {},
                  .tensors = {}};
    }
    TORCH_CHECK_VALUE(step == manifest.step, "rank ", rank, " saves step ", step, ", rank 0 step ", manifest.step);
    for (auto& [id, tensor] : parse_tensors(part)) {
      auto& merged = manifest.tensors.try_emplace(id, CheckpointTensor{tensor.dtype, tensor.shape, {}}).first->second;
      TORCH_CHECK_VALUE(tensor.dtype == merged.dtype && tensor.shape == merged.shape, "tensor ", id.text(), " is ",
                        tensor.dtype, " ", at::IntArrayRef(tensor.shape), " on rank ", rank, ", ", merged.dtype, " ",
                        at::IntArrayRef(merged.shape), " on ranks before it");
      merged.pieces.insert(merged.pieces.end(), tensor.pieces.begin(), tensor.pieces.end());
    }
  }
  for (const auto& [id, tensor] : manifest.tensors) check_pieces(id, tensor);
  return manifest;
}

CheckpointManifest read_manifest(const fs::path& folder) {
  const auto file = folder / kManifestFile;
  const auto text = read_text(file);
  const bool has_checksum = check_own_checksum(text, file);
  const auto json = parse_json(text, file);
  const JsonObject root(json, file);
  const auto version = root.integer("format_version");
  TORCH_CHECK_VALUE(version <= kFormatVersion, file.string(), ": format_version is ", version, ", written by ",
                    root.is_text("library_version") ? root.text("library_version") : "an unknown version",
                    " of megatron_cpp; this one, ", MCPP_VERSION, ", reads up to ", kFormatVersion);
  TORCH_CHECK_VALUE(version >= 1, file.string(), ": format_version is ", version);
  const bool needs_checksum = version > 2 || root.has("checksum");
  TORCH_CHECK_VALUE(has_checksum || !needs_checksum, file.string(), " is damaged: its last line is no checksum");
  CheckpointManifest manifest;
  manifest.step = root.integer("step");
  manifest.state = root.text("state");
  if (version > 1) {
    manifest.model = root.text("model");
    manifest.tokenizer = root.text("tokenizer");
  }
  if (version > 2) {
    manifest.configuration = parse_configuration(root);
    manifest.library_version = root.text("library_version");
  }
  const auto files = root.object("files");
  for (const auto& name : files.names()) {
    const auto digest = version > 2 ? parse_digest(files, name) : FileDigest{files.integer(name)};
    TORCH_CHECK_VALUE(is_file_name(name) && digest.bytes >= 0, file.string(), ": key files has ", name, " of ",
                      digest.bytes, " bytes: not a file in the manifest's folder");
    manifest.files.emplace(name, digest);
  }
  manifest.tensors = version == 1 ? parse_tensors_of_version_1(root) : parse_tensors(root);
  for (const auto& [id, tensor] : manifest.tensors) {
    try {
      check_pieces(id, tensor);
    } catch (const c10::ValueError& error) {
      TORCH_CHECK_VALUE(false, file.string(), ": ", error.what_without_backtrace());
    }
    for (const auto& piece : tensor.pieces) {
      TORCH_CHECK_VALUE(manifest.files.count(piece.file) > 0, file.string(), ": key files has no ", piece.file,
                        ", which tensor ", id.text(), " names");
    }
  }
  return manifest;
}

void check_part(const ShardedTensor& tensor) {
  TORCH_CHECK_VALUE(tensor.part.is_in(tensor.global_shape) && tensor.local.sizes() == tensor.part.shape(), "tensor ",
                    tensor.id.text(), " of shape ", at::IntArrayRef(tensor.global_shape), " has no part ",
                    tensor.part.text(), " of shape ", tensor.local.sizes());
}

namespace {

void check_there(const fs::path& file) {
  std::error_code unknown;  // the name may be too long for the file system
  TORCH_CHECK_VALUE(fs::is_regular_file(file, unknown), file.string(), " is missing");
}

}  // namespace

void check_size(const fs::path& file, int64_t expected) {
  check_there(file);
  const auto found = static_cast<int64_t>(fs::file_size(file));
  TORCH_CHECK_VALUE(found == expected, file.string(), " has ", found, " bytes, the manifest says ", expected);
}

void check_contents(const fs::path& file, const FileDigest& expected) {
  if (expected.checksum.empty()) return check_size(file, expected.bytes);
  check_there(file);
  const auto found = digest_of_file(file);
  TORCH_CHECK_VALUE(found == expected, file.string(), " is damaged: ", found.bytes, " bytes with the checksum ",
                    found.checksum, ", the manifest says ", expected.bytes, " bytes with the checksum ",
                    expected.checksum);
}

}  // namespace megatron_cpp::internal

std::string megatron_cpp::TensorId::text() const {
  return role == TensorRole::kParameter ? name : megatron_cpp::internal::role_text(role) + " of " + name;
}
