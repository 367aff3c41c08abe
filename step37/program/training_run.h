// What a run directory and its checkpoints contain: settings, tokenizer and state of a training run.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "megatron_cpp/checkpoint/sharded_checkpoint.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "megatron_cpp/training/trainer.h"
#include "parallel/process_groups.h"
#include "step37/data/batch_loader.h"
#include "step37/data/tokenizer.h"
#include "step37/program/captioner.h"
#include "step37/program/run_config.h"
#include "step37/program/run_metrics.h"
#include "step37/published_checkpoint.h"
#include "step37/published_config.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

/// Paths in a run directory.
struct RunFiles {
  std::filesystem::path directory;
  std::filesystem::path checkpoints() const { return directory / "checkpoints"; }
  std::filesystem::path metrics() const { return directory / "metrics.jsonl"; }
  std::filesystem::path tensorboard() const { return directory / "tensorboard"; }
  std::filesystem::path report() const { return directory / "report.html"; }
  std::filesystem::path tokenizer() const { return directory / "tokenizer.model"; }
  /// PublishedForm::to_text() of the model that the run was started from, with model.from or model.config.
  std::filesystem::path published() const { return directory / "published.json"; }
  std::filesystem::path lock() const { return directory / "lock"; }
  /// Traces, one a rank (RunSection::profile).
  std::filesystem::path profiles() const { return directory / "profile"; }
  /// What the search of a data set's picture folder found, for the next start.
  std::filesystem::path picture_index(const std::string& data_set) const { return picture_file(data_set, ".index"); }
  /// The paths of that folder's pictures, in the order in which the run's samplers number them.
  std::filesystem::path picture_order(const std::string& data_set) const { return picture_file(data_set, ".order"); }

 private:
  std::filesystem::path picture_file(const std::string& data_set, const char* extension) const {
    return directory / ((data_set == kDirectoryDataSet ? "pictures" : "pictures-" + data_set) + extension);
  }
};

/// All bytes of a file.
/// @throws c10::ValueError naming the file if it can't be read.
std::string bytes_of_file(const std::filesystem::path& path);

/// Locks a run directory for one process as long as the object lives: flock(2) on a file there, which the system
/// releases however the process ends.
class RunLock {
 public:
  /// Warns if the file system has no locks.
  /// @param activity  what a process with the lock does in the folder, for messages.
  /// @throws c10::ValueError naming the file if another process holds the lock, WriteError if it can't be created.
  explicit RunLock(const std::filesystem::path& path, std::string_view activity = "trains");
  ~RunLock();
  RunLock(const RunLock&) = delete;
  RunLock& operator=(const RunLock&) = delete;

 private:
  int file_;
};

/// Refuses a directory that can't hold a run: the directory or `checkpoints` is a link to nothing, or another file a
/// link into a folder that doesn't exist; `checkpoints` is no folder; another file is a folder; or metrics or tokenizer
/// is no regular file. Writes nothing.
/// @throws c10::ValueError naming the path, and the target of a link.
void check_run_files(const RunFiles& files);

/// Removes a file of a run. A link stays; what it leads to is removed if it is a regular file, so no device and no
/// pipe.
/// @throws std::filesystem::filesystem_error
void remove_run_file(const std::filesystem::path& path);

/// Removes the files of an earlier run. Links stay; their targets are emptied or removed.
/// @throws std::filesystem::filesystem_error
void remove_earlier_run(const RunFiles& files);

/// Identifies the tokenizer of a checkpoint.
struct TokenizerMark {
  std::string hash;  ///< of the bytes of the model file, hexadecimal
  int64_t vocabulary_size = 0;

  bool operator==(const TokenizerMark&) const = default;
};

/// The mark of `tokenizer`, which was loaded from `path`.
/// @throws c10::ValueError naming the file if it can't be read.
TokenizerMark mark_of(const std::filesystem::path& path, const Tokenizer& tokenizer);

/// What a checkpoint contains besides tensors.
struct RunState {
  RunConfig config;
  MixState data;  ///< where the data sets are
  int64_t optimizer_steps = 0;
  std::optional<TokenizerMark> tokenizer = std::nullopt;  ///< nullopt in checkpoints of old versions
  StepCounts step_counts = {};                            ///< 0 in checkpoints of old versions
  ConsumedData consumed = {};                             ///< counted from 0 in checkpoints of old versions
};
/// For CheckpointContents::state; the configuration is no part of it.
std::string to_text(const RunState& state);
/// @throws c10::ValueError naming `where` and what is wrong with the text.
/// @param configuration  CheckpointContents::configuration beside it. In old versions the text has the settings.
/// @param model  CheckpointContents::model beside it, for the shape of a model from a published configuration.
RunState run_state_from_text(const std::string& text, const std::string& where,
                             const CheckpointConfiguration& configuration = {}, const std::string& model = {});

/// The state in a checkpoint.
RunState run_state_of(const CheckpointReader& reader);

/// For CheckpointContents::model: the published form of a model that has one, else the settings of the sections model
/// and vision as JSON.
std::string model_text(const RunConfig& config);

/// Refuses changes of settings that a run must keep: all of the sections model (except init_std and what trains experts
/// evenly: coefficients, groups, rate) and vision, and data.vocabulary_size and training.seed. Others (steps, learning
/// rate, batch, layout, data, ...) may change.
/// @param began  the configuration in the checkpoint `where`.
/// @throws c10::ValueError naming each key with both values.
void check_resumable(const RunConfig& began, const RunConfig& now, const std::string& where);

/// Loads the tokenizer `path` and checks that it is the one in `state`, which a checkpoint contains.
/// @param checkpoint  folder of the checkpoint, for messages.
/// @throws c10::ValueError as Tokenizer::load, and naming both tokenizers if they differ.
Tokenizer load_tokenizer(const std::filesystem::path& path, const RunState& state,
                         const std::filesystem::path& checkpoint);

/// The checkpoints of a run directory, or the path itself. Not collective.
std::filesystem::path checkpoints_of(const std::filesystem::path& path);

/// find_checkpoint, the same on every rank: one looks, which warns once, and `latest` may change between two looks. All
/// its files are read and compared with the manifest.
/// Collective over `world`. @throws parallel::AgreedError on every rank as find_checkpoint and verify_checkpoint do;
/// the
///         message names a whole checkpoint beside a damaged one.
std::filesystem::path find_checkpoint_together(const std::filesystem::path& path, const parallel::GroupPtr& world);

/// The path of the tokenizer of a checkpoint, two folders above the step folder. Looks there first from `given`, the
/// path that the user gave, since `checkpoints` may be a link to another disk, then from `folder`, the step folder with
/// links resolved. Returns the path from `folder` if the file is in neither place.
std::filesystem::path tokenizer_of_checkpoint(const std::filesystem::path& given, const std::filesystem::path& folder);

/// What a published config.json says of the model of a run, whose tokenizer is `tokenizer`.
/// @throws c10::ValueError naming the tokenizer's file if it lacks a picture symbol.
PublishedConfig published_config(const RunConfig& config, const Tokenizer& tokenizer);

/// Sequences are padded to a multiple of lcm(64, t, 16), as the reference pads its packs.
int64_t padding_multiple(int tensor_parallel_size);

/// The weights that training starts with: model.from, if that is given and has weights. Not collective.
/// @throws c10::ValueError as PublishedCheckpoint does.
std::optional<PublishedCheckpoint> published_weights(const RunConfig& config);

/// Gives parameters the values that training starts with: those of `published`, which is published_weights(), or random
/// ones by training.seed and their names. Not collective.
void begin_parameters(const std::vector<ParameterShard>& parameters, const RunConfig& config,
                      const std::optional<PublishedCheckpoint>& published);

/// How the run's samples are packed and loaded: what its configuration says.
BatchLoaderOptions loader_options(const RunConfig& config, const Tokenizer& tokenizer, int tensor_parallel_size);

/// How a model captions that was trained with `tokenizer`: until the end token, without picture symbols.
CaptionerOptions captioner_options(const Tokenizer& tokenizer, const CropOptions& crops);
/// The same with the settings of the run.
CaptionerOptions captioner_options(const RunConfig& config, const Tokenizer& tokenizer, int tensor_parallel_size);

}  // namespace megatron_cpp::step37
