// The published checkpoint's names for this program's parameters.
#pragma once

#include <string>

namespace megatron_cpp::step37 {

/// The published name of a parameter (or segment) of Step37Model:
/// "language_model.decoder.layers.3.self_attention.linear_qkv.q_proj.weight" ->
/// "model.layers.3.self_attn.q_proj.weight".
/// @throws c10::ValueError naming a parameter that the published layout has no place for. Pure.
std::string published_name(const std::string& parameter);

}  // namespace megatron_cpp::step37
