#include "step37/checkpoint_names.h"

#include <c10/util/Exception.h>

#include <array>
#include <string_view>

namespace megatron_cpp::step37 {
namespace {

struct Renaming {
  std::string_view ours;
  std::string_view published;
};

/// Prefixes of whole names.
constexpr std::array<Renaming, 7> kPrefixes = {{
    {"language_model.embedding.word_embeddings.", "model.embed_tokens."},
    {"language_model.decoder.layers.", "model.layers."},
    {"language_model.mtp.layers.", "model.layers."},
    {"language_model.decoder.final_layernorm.", "model.norm."},
    {"language_model.output_layer.", "lm_head."},
    {"image_insert_embedding.align_projector.", "vit_large_projector."},
    {"vision_model.", "vision_model."},
}};

/// Prefixes of what follows "model.layers.N.".
constexpr std::array<Renaming, 13> kLayerParts = {{
    {"self_attention.linear_qkv.", "self_attn."},
    {"self_attention.linear_proj.", "self_attn.o_proj."},
    {"self_attention.", "self_attn."},
    {"pre_mlp_layernorm.", "post_attention_layernorm."},
    {"mlp.linear_fc1.", "mlp."},
    {"mlp.linear_fc2.", "mlp.down_proj."},
    {"final_layernorm.", "transformer.shared_head.norm."},
    {"output_layer.", "transformer.shared_head.output."},
    {"moe.router.expert_bias", "moe.router_bias"},
    {"moe.router.", "moe.gate."},
    {"moe.experts.", "moe."},
    {"moe.shared_experts.linear_fc1.", "share_expert."},
    {"moe.shared_experts.linear_fc2.", "share_expert.down_proj."},
}};

}  // namespace

std::string published_name(const std::string& parameter) {
  for (const auto& prefix : kPrefixes) {
    if (!parameter.starts_with(prefix.ours)) continue;
    auto rest = parameter.substr(prefix.ours.size());
    if (prefix.published != "model.layers.") return std::string(prefix.published) + rest;
    const auto number_end = rest.find('.') + 1;
    const auto layer = std::string(prefix.published) + rest.substr(0, number_end);
    rest = rest.substr(number_end);
    // A multi-token-prediction layer has a decoder layer in it, whose parts are the layer's own in the published
    // layout.
    if (constexpr std::string_view kInner = "transformer_layer."; rest.starts_with(kInner)) {
      rest = rest.substr(kInner.size());
    }
    for (const auto& part : kLayerParts) {
      if (rest.starts_with(part.ours)) return layer + std::string(part.published) + rest.substr(part.ours.size());
    }
    return layer + rest;
  }
  TORCH_CHECK_VALUE(false, "the published checkpoint layout has no name for parameter ", parameter);
}

}  // namespace megatron_cpp::step37
