// The published config.json of Step3.7, in both forms that occur: the one beside the released weights (the hub form),
// and the one that transformers' save_pretrained writes.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/transformer/transformer_config.h"
#include "step37/step37_model.h"
#include "step37/vision/vision_tower.h"

namespace megatron_cpp::step37 {

/// What a published config.json says of a model.
struct PublishedConfig {
  TransformerConfig text;                       ///< the decoder; its mtp_layers are all dense
  VisionConfig vision;                          ///< the tower
  bool projector_bias = false;                  ///< whether vit_large_projector has a bias
  int64_t image_token_id = 151679;              ///< placeholder of a row of image features
  std::optional<int64_t> image_start_token_id;  ///< the token before an image's rows, where the file has it
  std::optional<int64_t> patch_start_token_id;  ///< the token before a patch's rows, where the file has it
  int64_t pad_token_id = 1;                     ///< its embedding row is not trained
  std::vector<int64_t> eos_token_ids;           ///< empty: the file gives none
  int64_t max_position_embeddings = 128000;     ///< longest sequence
  std::string dtype = "bfloat16";               ///< of the weights: float32, float16 or bfloat16

  bool operator==(const PublishedConfig&) const = default;  ///< every field alike
};

/// Reads `file`. A list with an entry per layer may have the multi-token-prediction layers' entries at its end. Absent
/// keys have the defaults of Step3p7Config in transformers 5.23 (configuration_step3p7.py). `use_qk_norm` is not read:
/// the released configuration says false although the norms' weights exist and are used. Not collective.
/// @throws c10::ValueError naming file and key: not JSON; a value of another type or out of range; a list of another
///         length; a key absent whose default is not the same for every reader (moe_layers_enum,
///         moe_router_scaling_factor), or given with a value that readers take differently; a model that this library
///         doesn't compute (tied embeddings, another activation, sliding layers with other key/value heads or head
///         size, quantised weights); and, naming `file`, what TransformerConfig::validate and its like throw.
PublishedConfig read_published_config(const std::filesystem::path& file);

/// The same from the file's text; `where` is its name in messages.
PublishedConfig published_config_from_text(const std::string& text, const std::filesystem::path& where);

/// The hub form of the model that `config` describes, as JSON text: lists have the multi-token-prediction layers'
/// entries at their end.
/// @throws c10::ValueError if that form can't say it (layers of one type that differ).
std::string hub_form(const PublishedConfig& config);

/// The text of a config.json in the hub form: as it is, if it has that form, with all keys that readers of it know;
/// else rewritten. Throws as read_published_config and hub_form.
std::string hub_form(const std::filesystem::path& file);

/// A config.json's text with another dtype of the weights: float32, float16 or bfloat16.
std::string with_dtype(const std::string& text, const std::string& dtype);

/// The model that `config` describes; the embedding row of its padding token is trained only if `train_padding_row`.
/// Everything else has its default.
Step37Config step37_config(const PublishedConfig& config, bool train_padding_row);

}  // namespace megatron_cpp::step37
