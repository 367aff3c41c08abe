// Training checkpoints: every rank writes what it holds, any number of ranks reads it back.
//
//   checkpoints/step-00000100/rank-0000-of-0004.safetensors   the parts that rank 0 writes
//   checkpoints/step-00000100/manifest.json                   step, state, files and their checksums; each tensor's
//                                                             dtype, shape, pieces
//   checkpoints/latest -> step-00000100                       replaced last
//
// A folder is called step-N only when it is complete and flushed; until then it is step-N.partial. `latest` is for
// users: copying the run may turn it into a folder, and a file system may have no links, so readers use it as a hint.
#pragma once

#include <ATen/core/Tensor.h>

#include <compare>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/checkpoint/file_digest.h"
#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/parameters/box.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"
#include "parallel/process_groups.h"

namespace megatron_cpp {

/// The role of a checkpoint's tensor for the parameter of its name.
enum class TensorRole {
  kParameter,  ///< the parameter itself: the float32 copy of it, if there is one (ParameterSlice::main)
  kExpAvg,     ///< AdamW's decaying mean of the gradient
  kExpAvgSq,   ///< AdamW's decaying mean of its square
};

/// Which tensor of a checkpoint.
struct TensorId {
  /// The parameter of this name, or another tensor that belongs to it.
  TensorId(std::string of_parameter, TensorRole which = TensorRole::kParameter)
      : name(std::move(of_parameter)), role(which) {}

  std::string name;  ///< of the parameter, as CheckpointName gives it
  TensorRole role;   ///< which tensor of the parameter
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
  /// Whether this rank writes the part: of several replicas one is written.
  bool main_replica = true;
};

/// The name of a parameter or segment in this program -> its name in a checkpoint.
using CheckpointName = std::function<std::string(const std::string&)>;

/// The segments of all parameters, in their order. The ranks that hold the same part (GradientDomain::replicated_over)
/// share the writing out by bytes, to a row: each writes the tensors or rows (of dimension 0) of its share, and lists
/// the others, too, for loading. A segment without elements (a vocabulary shard that is all padding) gives an entry, so
/// that every rank asks a checkpoint for the same tensors. Not collective.
std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters,
                                           const CheckpointName& published_name, const parallel::ProcessGroups& groups);

/// The same of the parameters and the optimizer's moments: of a parameter that the optimizer updates, this rank's
/// elements in ParameterSlice::main and the moments, as few boxes as that takes; one without elements if it has none.
/// What the optimizer divides over the ranks (ParameterSlice::is_divided) is written by its owner.
/// After loading call Trainer::write_parameters(). (num_steps() is a number: it belongs in CheckpointContents::state.)
/// Not collective.
std::vector<ShardedTensor> sharded_tensors(const std::vector<ParameterShard>& parameters, const AdamW& optimizer,
                                           const CheckpointName& published_name, const parallel::ProcessGroups& groups);

/// Settings of the program that saves: keys and values, each key once, in their order.
using CheckpointConfiguration = std::vector<std::pair<std::string, std::string>>;

/// What one checkpoint holds.
struct CheckpointContents {
  int64_t step = 0;                    ///< optimizer steps done; names the folder
  std::string state;                   ///< small text (JSON), such as the sampler position; rank 0's is saved
  std::vector<ShardedTensor> tensors;  ///< of this rank; several may be parts of one tensor
  std::string model = {};              ///< JSON that describes the model; rank 0's is saved
  std::string tokenizer = {};          ///< hash of the tokenizer that the model was trained with; rank 0's is saved
  CheckpointConfiguration configuration = {};  ///< in UTF-8; rank 0's is saved
};

/// What becomes of older checkpoints.
struct SaveCheckpointOptions {
  /// How many checkpoints up to this step to keep, this one included; older ones are removed. 0: all.
  int64_t keep_last = 0;
};

/// Writes `contents` as `<directory>/step-N` and points `<directory>/latest` at it. A step-N of an earlier run is
/// replaced, what a killed run left behind (*.partial) is removed. `directory` must be the same, shared folder on every
/// rank, or a link to one; it is made if it doesn't exist. A folder called `latest` (a copied link) becomes a link
/// again; it is renamed to its step-N if that doesn't exist. On a file system without links there is no `latest`, and
/// one warning.
/// @return the folder written.
/// @throws parallel::AgreedError on every rank, with the same text, if a rank couldn't write, or if the ranks' slices
///         don't cover every element of a tensor exactly once (naming it); `latest` and older checkpoints then stay as
///         they were.
/// Collective over `world`: the lists of pieces (about 100 bytes per tensor and rank) in two all-gathers, sizes and
/// checksums of files in three, and four calls of agree(); no values are sent. CheckpointSaver does the same while
/// training goes on.
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

/// The step folder that `path` stands for, links resolved. `path` is a step folder or a link to one, or a folder of
/// checkpoints, or `latest` in it. In the last two cases the result is the target of `latest`. If that is missing, or
/// is a folder (a copied link) and older than another checkpoint, it is the newest complete one, with a warning. Not
/// collective: call it on one rank, since the answer changes while checkpoints are written.
/// @throws c10::ValueError naming `path` if it is none of these; and as latest_checkpoint.
std::filesystem::path find_checkpoint(const std::filesystem::path& path);

/// Removes the checkpoints in `directory`, unfinished ones and `latest`. All else stays, and so does the folder, which
/// may be a link or a mount point. Not collective.
/// @throws std::filesystem::filesystem_error
void remove_checkpoints(const std::filesystem::path& directory);

/// Reads a complete checkpoint of format version 1, 2 or 3 in any layout, whatever layout wrote it. Not collective:
/// each rank reads what it needs, and callers wrap construction and load in parallel::agree_on. The manifest's checksum
/// is compared, those of the files are not: that takes reading all of them (verify_checkpoint).
class CheckpointReader {
 public:
  /// @param path  as find_checkpoint takes it, with its warnings and errors.
  /// @throws c10::ValueError naming the manifest and both checksums, a newer version of the format and the library that
  ///         wrote it, or the key that is missing or wrong.
  explicit CheckpointReader(const std::filesystem::path& path);

  /// The step folder, links resolved: it stays the same when `latest` moves on.
  const std::filesystem::path& folder() const { return folder_; }
  int64_t step() const;  ///< CheckpointContents::step
  /// CheckpointContents::state, as it was given.
  const std::string& state() const;
  const std::string& model() const;      ///< CheckpointContents::model; empty in a checkpoint of format version 1
  const std::string& tokenizer() const;  ///< CheckpointContents::tokenizer; likewise
  /// CheckpointContents::configuration; empty in a checkpoint of format version 1 or 2.
  const CheckpointConfiguration& configuration() const;
  /// Of the library that saved; empty in a checkpoint of format version 1 or 2.
  const std::string& library_version() const;
  /// Size and checksum of each file beside the manifest; no checksums in a checkpoint of format version 1 or 2.
  const std::map<std::string, FileDigest>& files() const;
  /// All tensors, sorted.
  std::vector<TensorId> tensors() const;
  bool contains(const TensorId& id) const;  ///< whether it has this tensor
  /// @throws c10::ValueError naming the manifest and the tensor if it isn't there.
  const std::vector<int64_t>& global_shape(const TensorId& id) const;

  /// Fills each `local`, in place and without gradient, from the pieces that overlap it; only these are read. Floating
  /// point numbers of another dtype are converted.
  /// @throws c10::ValueError, before anything is filled: naming manifest and tensor, and both shapes and dtypes, if a
  ///         tensor is missing or has another shape or a dtype that can't be converted, or if one isn't asked for and
  ///         `unused` is kRefuse; naming tensor and file, if a file is missing, truncated or holds something else than
  ///         the manifest says.
  void load(const std::vector<ShardedTensor>& tensors, UnusedTensors unused = UnusedTensors::kRefuse) const;

 private:
  std::filesystem::path folder_;
  std::shared_ptr<const internal::CheckpointManifest> manifest_;
};

/// The complete checkpoint of the highest step in `directory`: its manifest can be read and every file named there has
/// its size. It is called step-N, or `latest` if that is a folder, not a link. A warning names each newer one that is
/// broken. Nothing if there is none, or no such directory. Not collective: call it on rank 0 and broadcast the result.
/// @throws c10::ValueError if there are some, but all are broken: starting over would lose them.
std::optional<std::filesystem::path> latest_checkpoint(const std::filesystem::path& directory);

/// Reads every file of the checkpoint in `folder` and compares size and checksum with the manifest (format version 1
/// and 2: sizes alone, reading nothing). The ranks share the files, so that together they read each once: the file that
/// a rank wrote is read by the rank of its number, which asks for the same parts if the layout is still the same.
/// @throws parallel::AgreedError on every rank, with the same text, as CheckpointReader does, or naming a file that is
///         missing, can't be read or differs, with both sizes and checksums. Collective over `world`.
void verify_checkpoint(const std::filesystem::path& folder, const parallel::GroupPtr& world);

/// What find_whole_checkpoint has found.
struct CheckpointSearch {
  /// The whole checkpoint of the highest step, as latest_checkpoint gives it; nothing if there are no checkpoints.
  std::optional<std::filesystem::path> whole;
  std::vector<std::string> damaged;  ///< what is wrong with each newer one, the newest first; names the file
};

/// Goes through the checkpoints in `directory`, the highest step first, until verify_checkpoint finds one whole.
/// Collective over `world`, with the same result on every rank.
/// @throws parallel::AgreedError on every rank if there are checkpoints, but all are damaged.
CheckpointSearch find_whole_checkpoint(const std::filesystem::path& directory, const parallel::GroupPtr& world);

}  // namespace megatron_cpp
