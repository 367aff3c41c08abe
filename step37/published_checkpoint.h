// Reads and writes published checkpoints of Step3.7: config.json and safetensors files.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"
#include "step37/published_config.h"
#include "step37/published_tensors.h"

namespace megatron_cpp::step37 {

/// What a published checkpoint holds besides values: enough to write it again from a training checkpoint, whose
/// manifest keeps it.
struct PublishedForm {
  std::string config;  ///< config.json in the hub form
  /// dtypes of tensors, by published name, that aren't of config.json's dtype (the released router biases); as
  /// safetensors files name them
  std::map<std::string, std::string> dtypes = {};
  bool has_weights = false;    ///< false: there is only config.json; the next two say nothing then
  bool has_mtp_layers = true;  ///< whether the weights have the multi-token-prediction layers that config announces
  bool has_qk_norms = true;    ///< whether the weights have norms of queries and keys

  /// JSON for CheckpointContents::model.
  std::string to_text() const;
  /// The form in a text of to_text(); nothing if it is another JSON object.
  /// @throws c10::ValueError naming `where` if the text isn't JSON.
  static std::optional<PublishedForm> from_text(const std::string& text, const std::filesystem::path& where);
  /// PublishedCheckpoint::config(): what `config` says, and the weights know better. Throws as
  /// published_config_from_text; `where` is the text's name in messages.
  PublishedConfig model(const std::filesystem::path& where) const;
  bool operator==(const PublishedForm&) const = default;
};

/// A folder with config.json and, unless it is for the shape alone, the weights: model.safetensors, or the files that
/// model.safetensors.index.json names. Files are memory-mapped; a rank reads only what it asks for. Not collective.
class PublishedCheckpoint {
 public:
  /// @throws c10::ValueError naming file and tensor: what read_published_config and SafetensorsFile throw; an index
  /// that
  ///         isn't one, names a file that isn't there or that lacks a tensor; a tensor that is in two files; quantised
  ///         weights (FP8 and NVFP4 releases); with a list of all of them, tensors that config.json's model lacks, or
  ///         that it has and that are missing, or of another shape or a dtype that isn't floating.
  ///         Multi-token-prediction layers are all there or not at all.
  explicit PublishedCheckpoint(const std::filesystem::path& folder);

  /// Whether the folder's files are those of a published checkpoint: config.json and weights.
  static bool is_at(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }  ///< as given to the constructor
  /// Of config.json. If there are weights, TransformerConfig::qk_layernorm and mtp_layers say what these have:
  /// mtp_layers is empty if the weights have none.
  const PublishedConfig& config() const { return config_; }
  /// How many multi-token-prediction layers config.json announces.
  int64_t announced_mtp_layers() const { return announced_mtp_layers_; }
  /// Whether there are weights beside config.json.
  bool has_weights() const { return !files_.empty(); }
  /// To write it again.
  PublishedForm form() const;
  /// Shapes of all tensors, by published name.
  PublishedTensors tensors() const;

  /// A copy of a part of a tensor, in the dtype of the file, on the CPU.
  at::Tensor read(const std::string& published_name, const Box& box) const;

  /// Fills the segments of `parameters` from the tensors of their published names, with a conversion to the parameters'
  /// dtype (exact from bfloat16 and float16 to float32). In place, without gradient.
  void load(const std::vector<ParameterShard>& parameters) const;

 private:
  struct Place {
    std::shared_ptr<const SafetensorsFile> file;
    std::string name;  ///< in the file: it may have a prefix more
  };
  void open(const std::filesystem::path& file);
  void check_tensors();
  const SafetensorsEntry& entry(const Place& place) const { return place.file->entries().at(place.name); }

  std::filesystem::path folder_;
  PublishedConfig config_;
  int64_t announced_mtp_layers_ = 0;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, Place> places_;  ///< by published name
};

/// How a published checkpoint is written.
struct WritePublishedOptions {
  /// float32, float16 or bfloat16 for all tensors and config.json; empty: as the form says.
  std::string dtype = {};
  /// More files, by name: their texts.
  std::map<std::string, std::string> files = {};
  /// Bytes of a file that no further tensor is added to; above it there are several files and an index.
  int64_t max_shard_size = 5'000'000'000;
};

/// Writes `folder`, which appears complete or not at all: config.json, and model.safetensors or several files with
/// model.safetensors.index.json. Each file's metadata has format=pt.
/// @param folder     doesn't exist, or is empty; the same, shared folder on every rank.
/// @param tensors    shapes by published name.
/// @param read       gives the whole tensor of that name, on the CPU, in any floating dtype. Only the rank that writes
/// a
///                   file calls it, once for each of the file's tensors, and holds no more than one.
/// @param copied     a folder whose tokenizer files and generation_config.json are copied along; empty: none.
/// Files are shared out over the ranks of `world`. Collective over `world`.
/// @throws parallel::AgreedError on every rank, naming the file, if a rank can't read or write.
void write_published_checkpoint(const std::filesystem::path& folder, const PublishedForm& form,
                                const PublishedTensors& tensors,
                                const std::function<at::Tensor(const std::string&)>& read,
                                const std::filesystem::path& copied, const parallel::GroupPtr& world,
                                const WritePublishedOptions& options = {});

/// Copies the tokenizer files and generation_config.json that `from` has into `to`. Not collective.
/// @throws std::filesystem::filesystem_error
void copy_tokenizer_files(const std::filesystem::path& from, const std::filesystem::path& to);

/// Refuses a folder to write to that exists and isn't empty.
/// @throws c10::ValueError naming it.
void check_new_folder(const std::filesystem::path& folder);

}  // namespace megatron_cpp::step37
