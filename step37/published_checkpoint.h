// Reads published checkpoints of Step3.7: config.json and safetensors files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/parameters/parameter_shard.h"
#include "step37/published_config.h"

namespace megatron_cpp::step37 {

/// A folder with config.json and, unless it is for the shape alone, the weights: model.safetensors, or the files that
/// model.safetensors.index.json names. Files are memory-mapped; a rank reads only what it asks for. Not collective.
class PublishedCheckpoint {
 public:
  /// @throws c10::ValueError naming file and tensor: what read_published_config and SafetensorsFile throw; an index
  /// that
  ///         isn't one, names a file that isn't there or that lacks a tensor; a tensor that is in two files; quantised
  ///         weights (FP8 and NVFP4 releases); multi-token-prediction layers that are there in part.
  explicit PublishedCheckpoint(const std::filesystem::path& folder);

  const std::filesystem::path& folder() const { return folder_; }  ///< as given to the constructor
  /// Of config.json, except TransformerConfig::qk_layernorm, which follows from the tensors if there are any.
  const PublishedConfig& config() const { return config_; }
  /// Whether there are weights beside config.json.
  bool has_weights() const { return !files_.empty(); }
  /// Whether there are weights for the multi-token-prediction layers that config.json announces; false if it announces
  /// none.
  bool has_mtp_weights() const { return has_mtp_weights_; }

  /// Fills the segments of `parameters` from the tensors of their published names, with a conversion to the parameters'
  /// dtype (exact from bfloat16 and float16 to float32). In place, without gradient.
  /// @throws c10::ValueError, before anything is filled, with a list of all tensors that are missing, have another
  ///         shape or a dtype that isn't floating, or that no parameter asks for. Every rank of a model gets the same
  ///         list. Tensors of multi-token-prediction layers need no parameter.
  void load(const std::vector<ParameterShard>& parameters) const;

 private:
  struct Place {
    std::shared_ptr<const SafetensorsFile> file;
    std::string name;  ///< in the file: it may have a prefix more
  };
  void open(const std::filesystem::path& file);
  void check_mtp_layers();

  std::filesystem::path folder_;
  PublishedConfig config_;
  std::vector<std::shared_ptr<const SafetensorsFile>> files_;
  std::map<std::string, Place> tensors_;  ///< by published name
  bool has_mtp_weights_ = false;
};

}  // namespace megatron_cpp::step37
