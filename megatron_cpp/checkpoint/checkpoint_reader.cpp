#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <map>
#include <set>
#include <utility>

#include "megatron_cpp/checkpoint/checkpoint_manifest.h"
#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "parallel/agree.h"

namespace megatron_cpp {
namespace {

namespace fs = std::filesystem;
using internal::CheckpointManifest;
using internal::CheckpointPiece;
using internal::CheckpointTensor;
using internal::kManifestFile;

/// A box of a part, and the index of its first element in a one-dimensional tensor that holds the part.
struct PlacedBox {
  Box box;
  int64_t first = 0;
};

std::vector<PlacedBox> placed_boxes(const TensorPart& part) {
  std::vector<PlacedBox> result;
  int64_t first = 0;
  for (auto& box : part.boxes()) {
    const int64_t numel = box.numel();
    result.push_back({std::move(box), first});
    first += numel;
  }
  return result;
}

/// Calls action(box of `piece`, box of `wanted`, shared box) for each pair of boxes that share elements.
template <class Action>
void for_each_overlap(const TensorPart& piece, const TensorPart& wanted, const Action& action) {
  const auto wanted_boxes = placed_boxes(wanted);
  for (const auto& stored : placed_boxes(piece)) {
    for (const auto& asked : wanted_boxes) {
      if (const auto shared = intersection(stored.box, asked.box)) action(stored, asked, *shared);
    }
  }
}

bool overlaps(const TensorPart& piece, const TensorPart& wanted) {
  bool result = false;
  for_each_overlap(piece, wanted, [&](const auto&...) { result = true; });
  return result;
}

/// A view of `shared` in a tensor that holds `part`, of which `placed` is a box.
at::Tensor view_in(const at::Tensor& tensor, const TensorPart& part, const PlacedBox& placed, const Box& shared) {
  if (!part.elements) return view_of(tensor, placed.box, shared);
  return view_of(tensor.narrow(0, placed.first, placed.box.numel()).view(placed.box.length), placed.box, shared);
}

void copy_overlap(const SafetensorsFile& file, const CheckpointPiece& piece, const ShardedTensor& wanted) {
  for_each_overlap(piece.part, wanted.part, [&](const PlacedBox& stored, const PlacedBox& asked, const Box& shared) {
    const auto target = view_in(wanted.local, wanted.part, asked, shared);
    if (piece.part.elements) {
      const Box run{{stored.first}, {stored.box.numel()}};
      target.copy_(view_of(file.read(piece.key, run).view(stored.box.length), stored.box, shared));
    } else {
      Box relative = shared;
      for (size_t d = 0; d < relative.begin.size(); ++d) relative.begin[d] -= stored.box.begin[d];
      target.copy_(file.read(piece.key, relative));
    }
  });
}

/// Of a dtype's name in a file.
bool is_floating_point(const std::string& dtype) {
  return dtype == "F64" || dtype == "F32" || dtype == "F16" || dtype == "BF16";
}

/// The file of a piece, opened unless it is open. Refuses one that doesn't hold what the manifest says.
const SafetensorsFile& open_piece(const fs::path& folder, const CheckpointPiece& piece, const TensorId& id,
                                  const CheckpointTensor& tensor, std::map<std::string, SafetensorsFile>& open_files) {
  auto found = open_files.find(piece.file);
  if (found == open_files.end()) {
    try {
      found = open_files.emplace(piece.file, SafetensorsFile(folder / piece.file)).first;
    } catch (const c10::Error& error) {
      TORCH_CHECK_VALUE(false, "tensor ", id.text(), ": ", error.what_without_backtrace());
    }
  }
  const auto& file = found->second;
  const auto expected = piece.part.shape();
  const auto entry = file.entries().find(piece.key);
  TORCH_CHECK_VALUE(entry != file.entries().end(), file.path().string(), ": no tensor ", piece.key,
                    ", the manifest says that a piece of ", id.text(), " is there");
  TORCH_CHECK_VALUE(entry->second.shape == expected && entry->second.dtype_name == tensor.dtype, file.path().string(),
                    ": tensor ", piece.key, " is ", entry->second.dtype_name, " ", at::IntArrayRef(entry->second.shape),
                    ", the manifest says ", tensor.dtype, " ", at::IntArrayRef(expected));
  return file;
}

}  // namespace

CheckpointReader::CheckpointReader(const fs::path& path)
    : folder_(find_checkpoint(path)),
      manifest_(std::make_shared<CheckpointManifest>(internal::read_manifest(folder_))) {}

int64_t CheckpointReader::step() const { return manifest_->step; }

const std::string& CheckpointReader::state() const { return manifest_->state; }

const std::string& CheckpointReader::model() const { return manifest_->model; }

const std::string& CheckpointReader::tokenizer() const { return manifest_->tokenizer; }

const CheckpointConfiguration& CheckpointReader::configuration() const { return manifest_->configuration; }

const std::string& CheckpointReader::library_version() const { return manifest_->library_version; }

const std::map<std::string, FileDigest>& CheckpointReader::files() const { return manifest_->files; }

std::vector<TensorId> CheckpointReader::tensors() const {
  std::vector<TensorId> result;
  result.reserve(manifest_->tensors.size());
  for (const auto& [id, tensor] : manifest_->tensors) result.push_back(id);
  return result;
}

bool CheckpointReader::contains(const TensorId& id) const { return manifest_->tensors.count(id) > 0; }

const std::vector<int64_t>& CheckpointReader::global_shape(const TensorId& id) const {
  const auto found = manifest_->tensors.find(id);
  TORCH_CHECK_VALUE(found != manifest_->tensors.end(), (folder_ / kManifestFile).string(), ": no tensor ", id.text());
  return found->second.shape;
}

void CheckpointReader::load(const std::vector<ShardedTensor>& tensors, UnusedTensors unused) const {
  const auto manifest_file = (folder_ / kManifestFile).string();
  std::set<TensorId> asked;
  std::map<std::string, SafetensorsFile> open_files;
  struct Copy {
    const SafetensorsFile& file;
    const CheckpointPiece& piece;
    const ShardedTensor& wanted;
  };
  std::vector<Copy> copies;
  for (const auto& wanted : tensors) {
    internal::check_part(wanted);
    asked.insert(wanted.id);
    const auto found = manifest_->tensors.find(wanted.id);
    TORCH_CHECK_VALUE(found != manifest_->tensors.end(), manifest_file, ": no tensor ", wanted.id.text(),
                      "; asked for one of shape ", at::IntArrayRef(wanted.global_shape));
    const auto& tensor = found->second;
    const auto dtype = safetensors_dtype(wanted.local.scalar_type(), wanted.id.text());
    const bool fits = tensor.dtype == dtype || (is_floating_point(tensor.dtype) && is_floating_point(dtype));
    TORCH_CHECK_VALUE(tensor.shape == wanted.global_shape && fits, manifest_file, ": tensor ", wanted.id.text(), " is ",
                      tensor.dtype, " ", at::IntArrayRef(tensor.shape), ", asked for as ", dtype, " ",
                      at::IntArrayRef(wanted.global_shape));
    for (const auto& piece : tensor.pieces) {
      if (!overlaps(piece.part, wanted.part)) continue;
      copies.push_back({open_piece(folder_, piece, wanted.id, tensor, open_files), piece, wanted});
    }
  }
  for (const auto& [id, tensor] : manifest_->tensors) {
    TORCH_CHECK_VALUE(unused == UnusedTensors::kAllow || asked.count(id) > 0, manifest_file, ": tensor ", id.text(),
                      " of shape ", at::IntArrayRef(tensor.shape), " is not asked for");
  }
  const at::NoGradGuard no_grad;
  for (const auto& [file, piece, wanted] : copies) copy_overlap(file, piece, wanted);
}

void verify_checkpoint(const fs::path& folder, const parallel::GroupPtr& world) {
  parallel::agree_on(
      [&] {
        const auto manifest = internal::read_manifest(folder);
        int turn = 0;
        for (const auto& [name, digest] : manifest.files) {
          if (turn++ % world->getSize() == world->getRank()) internal::check_contents(folder / name, digest);
        }
      },
      world);
}

}  // namespace megatron_cpp
