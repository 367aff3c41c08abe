#include "megatron_cpp/checkpoint/checkpoint_manifest.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>
#include <utility>

#include "megatron_cpp/checkpoint/json_integer.h"

namespace megatron::internal {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int64_t kFormatVersion = 1;

/// Refuses pieces that leave an element of the tensor out or hold it twice.
void check_pieces(const std::string& name, const CheckpointTensor& tensor) {
  const auto tensor_text = c10::str("tensor ", name, " of shape ", at::IntArrayRef(tensor.shape));
  auto pieces = tensor.pieces;
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const auto& a, const auto& b) { return a.rows.begin < b.rows.begin; });
  const int64_t dim = pieces.empty() ? 0 : pieces.front().dim;
  TORCH_CHECK_VALUE(std::all_of(tensor.shape.begin(), tensor.shape.end(), [](int64_t size) { return size >= 0; }),
                    tensor_text, " has a negative size");
  TORCH_CHECK_VALUE(is_dim_of(dim, tensor.shape), tensor_text, " has no dimension ", dim, " to be split in");
  const int64_t num_rows = tensor.shape[static_cast<size_t>(dim)];
  const auto check_gap = [&](int64_t begin, int64_t end) {
    TORCH_CHECK_VALUE(begin >= end, tensor_text, ": rows [", begin, ", ", end, ") of dimension ", dim,
                      " are in no piece");
  };
  int64_t position = 0;
  const CheckpointPiece* previous = nullptr;
  for (const auto& piece : pieces) {
    TORCH_CHECK_VALUE(piece.dim == dim, tensor_text, " is split in dimensions ", dim, " and ", piece.dim);
    TORCH_CHECK_VALUE(piece.rows.begin >= 0 && piece.rows.begin < piece.rows.end && piece.rows.end <= num_rows,
                      tensor_text, " has no rows [", piece.rows.begin, ", ", piece.rows.end, ") of dimension ", dim,
                      ", said to be in ", piece.file);
    TORCH_CHECK_VALUE(piece.rows.begin >= position, tensor_text, ": row ", piece.rows.begin, " of dimension ", dim,
                      " is in two pieces, in ", previous->file, " and ", piece.file);
    check_gap(position, piece.rows.begin);
    position = piece.rows.end;
    previous = &piece;
  }
  check_gap(position, num_rows);
}

/// An object of a manifest that knows where it stands in the file.
class ManifestObject {
 public:
  ManifestObject(const Json& json, const fs::path& file, std::string key)
      : json_(json), file_(file), key_(std::move(key)) {
    TORCH_CHECK_VALUE(json_.is_object(), file_.string(), ": ", key_.empty() ? "the whole" : "key " + key_,
                      " is not a JSON object");
  }
  std::string text(const std::string& name) const {
    const auto& value = at(name);
    TORCH_CHECK_VALUE(value.is_string(), file_.string(), ": key ", path_to(name), " is not a string");
    return value.get<std::string>();
  }
  int64_t integer(const std::string& name) const {
    const auto value = integer_of(at(name));
    TORCH_CHECK_VALUE(value.has_value(), file_.string(), ": key ", path_to(name), " is not a 64-bit integer");
    return *value;
  }
  std::vector<int64_t> integers(const std::string& name) const {
    const auto values = integers_of(at(name));
    TORCH_CHECK_VALUE(values.has_value(), file_.string(), ": key ", path_to(name), " is not a list of 64-bit integers");
    return *values;
  }
  ManifestObject object(const std::string& name) const { return {at(name), file_, path_to(name)}; }
  std::vector<ManifestObject> objects(const std::string& name) const {
    std::vector<ManifestObject> result;
    const auto& array = at(name);
    TORCH_CHECK_VALUE(array.is_array(), file_.string(), ": key ", path_to(name), " is not a JSON array");
    for (const auto& element : array) {
      result.emplace_back(element, file_, path_to(name) + "[" + std::to_string(result.size()) + "]");
    }
    return result;
  }
  std::vector<std::string> names() const {
    std::vector<std::string> result;
    for (const auto& [name, value] : json_.items()) result.push_back(name);
    return result;
  }

 private:
  std::string path_to(const std::string& name) const { return key_.empty() ? name : key_ + "/" + name; }
  const Json& at(const std::string& name) const {
    const auto found = json_.find(name);
    TORCH_CHECK_VALUE(found != json_.end(), file_.string(), ": there is no key ", path_to(name));
    return *found;
  }

  const Json& json_;
  const fs::path& file_;
  std::string key_;
};

Json manifest_json(const CheckpointManifest& manifest) {
  Json tensors = Json::object();
  for (const auto& [name, tensor] : manifest.tensors) {
    Json pieces = Json::array();
    for (const auto& piece : tensor.pieces) {
      pieces.push_back(
          {{"file", piece.file}, {"dim", piece.dim}, {"begin", piece.rows.begin}, {"length", piece.rows.length()}});
    }
    tensors[name] = {{"dtype", tensor.dtype}, {"shape", tensor.shape}, {"pieces", std::move(pieces)}};
  }
  return {{"format_version", kFormatVersion},
          {"step", manifest.step},
          {"state", manifest.state},
          {"files", manifest.file_bytes},
          {"tensors", std::move(tensors)}};
}

/// Whether a file of this name can only be in the folder itself.
bool is_file_name(std::string_view name) {
  constexpr std::string_view kSeparators("/\0", 2);
  return !name.empty() && name != "." && name != ".." && name.find_first_of(kSeparators) == std::string_view::npos;
}

CheckpointTensor parse_tensor(const ManifestObject& object) {
  CheckpointTensor tensor{object.text("dtype"), object.integers("shape"), {}};
  for (const auto& piece : object.objects("pieces")) {
    const auto begin = piece.integer("begin");
    int64_t end = 0;
    if (__builtin_add_overflow(begin, piece.integer("length"), &end)) end = -1;  // check_pieces refuses it
    tensor.pieces.push_back({piece.text("file"), piece.integer("dim"), {begin, end}});
  }
  return tensor;
}

}  // namespace

bool is_dim_of(int64_t dim, const std::vector<int64_t>& shape) {
  return dim >= 0 && dim < static_cast<int64_t>(shape.size());
}

std::string to_text(const CheckpointManifest& manifest, int indent) { return manifest_json(manifest).dump(indent); }

CheckpointManifest merge_manifests(const std::vector<std::string>& parts, int64_t step, const std::string& state) {
  CheckpointManifest manifest{step, state, {}, {}};
  for (size_t rank = 0; rank < parts.size(); ++rank) {
    const auto json = Json::parse(parts[rank]);
    const fs::path origin = "the list of rank " + std::to_string(rank);
    const ManifestObject part(json, origin, "");
    const auto part_step = part.integer("step");
    TORCH_CHECK_VALUE(part_step == step, "rank ", rank, " saves step ", part_step, ", rank 0 step ", step);
    const auto tensors = part.object("tensors");
    for (const auto& name : tensors.names()) {
      const auto tensor = parse_tensor(tensors.object(name));
      auto& merged = manifest.tensors.try_emplace(name, CheckpointTensor{tensor.dtype, tensor.shape, {}}).first->second;
      TORCH_CHECK_VALUE(tensor.dtype == merged.dtype && tensor.shape == merged.shape, "tensor ", name, " is ",
                        tensor.dtype, " ", at::IntArrayRef(tensor.shape), " on rank ", rank, ", ", merged.dtype, " ",
                        at::IntArrayRef(merged.shape), " on ranks before it");
      merged.pieces.insert(merged.pieces.end(), tensor.pieces.begin(), tensor.pieces.end());
    }
  }
  for (const auto& [name, tensor] : manifest.tensors) check_pieces(name, tensor);
  return manifest;
}

CheckpointManifest read_manifest(const fs::path& folder) {
  const auto file = folder / kManifestFile;
  std::ifstream stream(file);
  TORCH_CHECK_VALUE(stream, "cannot open ", file.string(), ": ", std::strerror(errno));
  const auto json = Json::parse(stream, /*cb=*/nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(!json.is_discarded(), file.string(), " is not JSON");
  const ManifestObject root(json, file, "");
  const auto version = root.integer("format_version");
  TORCH_CHECK_VALUE(version == kFormatVersion, file.string(), ": format_version is ", version, ", this program reads ",
                    kFormatVersion);
  CheckpointManifest manifest{root.integer("step"), root.text("state"), {}, {}};
  const auto files = root.object("files");
  for (const auto& name : files.names()) {
    const auto bytes = files.integer(name);
    TORCH_CHECK_VALUE(is_file_name(name) && bytes >= 0, file.string(), ": key files has ", name, " of ", bytes,
                      " bytes: not a file in the manifest's folder");
    manifest.file_bytes.emplace(name, bytes);
  }
  const auto tensors = root.object("tensors");
  for (const auto& name : tensors.names()) {
    auto tensor = parse_tensor(tensors.object(name));
    try {
      check_pieces(name, tensor);
    } catch (const c10::ValueError& error) {
      TORCH_CHECK_VALUE(false, file.string(), ": ", error.what_without_backtrace());
    }
    for (const auto& piece : tensor.pieces) {
      TORCH_CHECK_VALUE(manifest.file_bytes.count(piece.file) > 0, file.string(), ": key files has no ", piece.file,
                        ", which tensor ", name, " names");
    }
    manifest.tensors.emplace(name, std::move(tensor));
  }
  return manifest;
}

void check_files(const fs::path& folder, const CheckpointManifest& manifest) {
  for (const auto& [name, bytes] : manifest.file_bytes) {
    const auto file = folder / name;
    std::error_code unknown;  // a name may be too long to be asked for
    TORCH_CHECK_VALUE(fs::is_regular_file(file, unknown), file.string(), " is missing");
    const auto found = static_cast<int64_t>(fs::file_size(file));
    TORCH_CHECK_VALUE(found == bytes, file.string(), " has ", found, " bytes, the manifest says ", bytes);
  }
}

}  // namespace megatron::internal
