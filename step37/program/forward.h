// Runs a published checkpoint on given tensors: logits, loss and gradients, for comparison with other implementations.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace megatron_cpp::parallel {
class Runtime;
}

namespace megatron_cpp::step37 {

/// The options of `step37 forward`.
struct ForwardArguments {
  std::filesystem::path model;               ///< a published checkpoint
  std::filesystem::path input;               ///< see forward()
  std::filesystem::path output;              ///< see forward()
  std::optional<int64_t> image_start_token;  ///< else config.json's image_start_token_id
  std::optional<int64_t> patch_start_token;  ///< else config.json's patch_start_token_id
  bool sequence_parallel = false;
  std::string mm_encoder_tp_mode = "data";  ///< data or weights, as parallel.mm_encoder_tp_mode
  bool gradients = false;
  int expert_parallel = 1;
  std::optional<int> expert_tensor_parallel;  ///< else the number of ranks / expert_parallel
  std::string dtype = "float32";              ///< float32, float64 or bfloat16
  std::string dump;                           ///< empty, or layers
};

/// All ranks are one tensor-parallel group. Reads from `input`:
///   input_ids [B, S] int64; pixel_values [N, 3, h, w], and pixel_values_local [P, 3, h, w] with num_local_patches [N]
///   (patches of each image); labels [B, S] int64, -100 for no loss. Tensors of other names are ignored.
/// In input_ids every row of image features has the placeholder config.json's image_token_id, an image's patches before
/// the image. With start tokens given, each picture's rows must follow one; otherwise the k-th placeholder takes the
/// k-th row, as in transformers.
///
/// Writes to `output`, completely or not at all: logits [B, S, V]; loss (a float32 scalar, float64 with --dtype
/// float64: the mean over the counted labels, which are shifted by one position inside) if there are labels;
/// inputs_embeds [B, S, H]; image_features [rows, H] in the order of the sequence, if there are pictures; with
/// `gradients` grad.<published name> of every trained tensor in its published shape, zeros where nothing flows; with
/// `dump` layers.N.output [B, S, H], and with gradients grad.layers.N.output.
/// @return  the exit status, 0.
/// @throws c10::ValueError or parallel::AgreedError on every rank, naming what is wrong. Collective over all ranks.
int forward(parallel::Runtime& runtime, const ForwardArguments& arguments);

}  // namespace megatron_cpp::step37
