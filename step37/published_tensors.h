// Names and shapes of the tensors of a published checkpoint.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "step37/published_config.h"

namespace megatron_cpp::step37 {

/// Shapes by published name.
using PublishedTensors = std::map<std::string, std::vector<int64_t>>;

/// The tensors of the model that `config` describes, without those of config.text.mtp_layers. Pure.
PublishedTensors published_tensors(const PublishedConfig& config);

/// The tensors of config.text.mtp_layers, 17 each (15 without TransformerConfig::qk_layernorm), "model.layers.45.enorm
/// .weight" and so on. Pure.
PublishedTensors published_mtp_tensors(const PublishedConfig& config);

}  // namespace megatron_cpp::step37
