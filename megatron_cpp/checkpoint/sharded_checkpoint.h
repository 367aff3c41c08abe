// Training checkpoints: every rank writes what it holds, any number of ranks reads it back.
//
//   checkpoints/step-00000100/rank-0000-of-0004.safetensors   the parts that rank 0 writes
//   checkpoints/step-00000100/manifest.json                   step, state, files; each tensor's dtype, shape, pieces
//   checkpoints/latest -> step-00000100                       replaced last
//
// A folder is called step-N only when it is complete and flushed; until then it is step-N.partial. `latest` is for
// users: a copy of the run may have made a folder of it, and a file system may have no links. Readers here take it for
// a hint.
#pragma once

#include <ATen/core/Tensor.h>

#include <compare>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/parameters/box.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

/// What a tensor of a checkpoint is to the parameter whose name it has.
enum class TensorRole {
  kParameter,  ///< the parameter itself
  kMain,       ///< the optimizer's copy of it, of higher precision
  kExpAvg,     ///< AdamW's decaying mean of the gradient
  kExpAvgSq,   ///< AdamW's decaying mean of its square
};

/// Which tensor of a checkpoint.
struct TensorId {
  /// The parameter of a name, or something else of it.
  TensorId(std::string of_parameter, TensorRole which = TensorRole::kParameter)
      : name(std::move(of_parameter)), role(which) {}

  std::string name;  ///< of the parameter, as published
  TensorRole role;   ///< what of it
  /// "model.norm.weight", or "exp_avg of model.norm.weight".
  std::string text() const;
  auto operator<=>(const TensorId&) const = default;
};

/// A rank's part of a global tensor.
struct ShardedTensor {
  TensorId id;                        ///< in the checkpoint
  at::Tensor local;                   ///< of part.shape(), without gradient: loading writes through it
  std::vector<int64_t> global_shape;  ///< over all ranks, without vocabulary padding
  TensorPart part;                    ///< which elements; may be none
  /// Whether this rank writes them: replicas are written once.
  bool main_replica = true;
};

/// The name of a parameter or segment in this program -> its name in a checkpoint.
using CheckpointName = std::function<std::string(const std::string&)>;

/// The segments of all parameters, in their order. Tensor-parallel rank 0 writes the replicated ones, data-parallel
/// rank 0 writes at all. A segment without elements (a vocabulary shard that is all padding) gives an entry, too, so
/// that every rank asks a checkpoint for the same tensors. Not collective.
std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters,
                                           const CheckpointName& published_name, const parallel::ProcessGroups& groups);

/// The same segments of the optimizer's moments. (num_steps() is a number: it belongs in CheckpointContents::state.)
/// @throws c10::ValueError for an optimizer that has a part of a parameter only. Not collective.
std::vector<ShardedTensor> sharded_tensors(const AdamW& optimizer, const CheckpointName& published_name,
                                           const parallel::ProcessGroups& groups);

/// What one checkpoint holds.
struct CheckpointContents {
  int64_t step = 0;                    ///< optimizer steps done; names the folder
  std::string state;                   ///< small text (JSON): sampler position, anything; that of rank 0 is kept
  std::vector<ShardedTensor> tensors;  ///< of this rank; an id at most once
  std::string model = {};              ///< JSON: what the model is; that of rank 0 is kept
  std::string tokenizer = {};          ///< a hash: which tokenizer the model was trained with; that of rank 0 is kept
};

/// What becomes of older checkpoints.
struct SaveCheckpointOptions {
  /// How many checkpoints up to this step to keep, this one included; older ones are removed. 0: all.
  int64_t keep_last = 0;
};

/// Writes `contents` as `<directory>/step-N` and points `<directory>/latest` at it. A step-N of an earlier run is
/// replaced, what a killed run left behind (*.partial) is removed. `directory` must be the same, shared folder on every
/// rank, or a link to one; it is made if it doesn't exist. A folder called `latest`, the copy of a link, becomes a link
/// again, and its checkpoint step-N if that isn't there. Without links on the file system there is no `latest`, and
/// one warning.
/// @return the folder written.
/// @throws parallel::AgreedError on every rank, with the same text, if a rank couldn't write, or if the ranks' slices
///         don't cover every element of a tensor exactly once (naming it); `latest` and older checkpoints then stay as
///         they were.
/// Collective over `world`: the lists of pieces (about 100 bytes a tensor and rank) in two all-gathers, and four small
/// ones of agreement; no values are sent.
std::filesystem::path save_checkpoint(const std::filesystem::path& directory, const CheckpointContents& contents,
                                      const parallel::GroupPtr& world, const SaveCheckpointOptions& options = {});

/// Tensors of a checkpoint that a load doesn't ask for.
enum class UnusedTensors {
  kRefuse,
  kAllow,  ///< such as the moments, when only the parameters are wanted
};

namespace internal {
struct CheckpointManifest;
}

/// The step folder that `path` means, links resolved: it is one, or a link to one; or the folder that holds such, or
/// `latest` in it. Of these two it is what `latest` leads to; unless that isn't there, or is a folder, the copy of a
/// link, and older than another: then the newest that is whole, with a warning. Not collective: on several ranks let
/// one ask, since the answer changes as checkpoints come.
/// @throws c10::ValueError naming `path` if it is none of these; and as latest_checkpoint.
std::filesystem::path find_checkpoint(const std::filesystem::path& path);

/// Removes the checkpoints in `directory`, half written ones and `latest`. All else stays, and so does the folder,
/// which may be a link or a mount point. Not collective.
/// @throws std::filesystem::filesystem_error
void remove_checkpoints(const std::filesystem::path& directory);

/// A complete checkpoint of format version 1 or 2, read in any layout whatever layout wrote it. Not collective: a rank
/// reads what it needs, and callers wrap construction and load in parallel::agree_on.
class CheckpointReader {
 public:
  /// @param path  as find_checkpoint takes it, with its warnings and errors.
  /// @throws c10::ValueError naming the manifest and the key in it that is missing or wrong.
  explicit CheckpointReader(const std::filesystem::path& path);

  /// The step folder, links resolved: it stays the same when `latest` moves on.
  const std::filesystem::path& folder() const { return folder_; }
  int64_t step() const;  ///< CheckpointContents::step
  /// CheckpointContents::state, as it was given.
  const std::string& state() const;
  const std::string& model() const;      ///< CheckpointContents::model; empty in a checkpoint of format version 1
  const std::string& tokenizer() const;  ///< CheckpointContents::tokenizer; likewise
  /// All tensors, sorted.
  std::vector<TensorId> tensors() const;
  bool contains(const TensorId& id) const;  ///< whether it has this tensor
  /// @throws c10::ValueError naming the manifest and the tensor if it isn't there.
  const std::vector<int64_t>& global_shape(const TensorId& id) const;

  /// Fills each `local`, in place and without gradient, from the pieces that overlap it; only these are read.
  /// @throws c10::ValueError, before anything is filled: naming manifest and tensor, and what is asked and what there,
  ///         if a tensor is missing or has another shape or dtype, or if one isn't asked for and `unused` is kRefuse;
  ///         naming tensor and file, if a file is missing, truncated or holds something else than the manifest says.
  void load(const std::vector<ShardedTensor>& tensors, UnusedTensors unused = UnusedTensors::kRefuse) const;

 private:
  std::filesystem::path folder_;
  std::shared_ptr<const internal::CheckpointManifest> manifest_;
};

/// The complete checkpoint of the highest step in `directory`: its manifest can be read and every file named there has
/// its size. It is called step-N, or `latest` if that is a folder of its own. A warning names each newer one that is
/// broken. Nothing if there is none, or no such directory. Not collective: rank 0 asks, and broadcasts the answer.
/// @throws c10::ValueError if there are some, but all are broken: whoever would start over would lose them.
std::optional<std::filesystem::path> latest_checkpoint(const std::filesystem::path& directory);

}  // namespace megatron_cpp
