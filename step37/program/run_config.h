// The configuration of a training run: a YAML file and `key=value` overrides.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "megatron_cpp/data/packed_batch.h"
#include "megatron_cpp/optimizer/adamw.h"
#include "megatron_cpp/optimizer/gradient_buffer.h"
#include "megatron_cpp/training/learning_rate.h"
#include "megatron_cpp/training/step_profile.h"
#include "megatron_cpp/training/trainer.h"
#include "parallel/rank_grid.h"
#include "step37/data/crop_plan.h"
#include "step37/insert/image_insert_embedding.h"
#include "step37/program/data_sets.h"
#include "step37/published_checkpoint.h"
#include "step37/published_config.h"
#include "step37/step37_model.h"

namespace megatron_cpp::step37 {

// Each section of the file is a struct here, and each of its keys a member of the same name. "Required": there is no
// default; the file or an override has to give a value.

struct RunSection {
  std::string directory;                ///< where results go; default: runs/<stem of the configuration file>
  bool fresh = false;                   ///< start over instead of resuming from the latest checkpoint
  std::string device = "auto";          ///< auto, cpu or cuda
  bool share_gpus = false;              ///< ranks may compute on the same GPU
  int64_t timeout_seconds = 600;        ///< how long a collective may wait for its peers
  std::string master_address;           ///< NCCL: address of the host of rank 0; empty: its host name
  bool checked = checked_by_default();  ///< ranks compare what must be equal before they exchange embeddings
  StepRange profile;                    ///< steps to record (StepProfile), written 3 or 3-5; `none`
};

struct ParallelSection {
  int64_t tp = 1;   ///< tensor parallel: ranks that share a copy of the model; 0: all ranks / dp
  int64_t dp = 0;   ///< data parallel: copies of the model; 0: all ranks / tp, or 1 if tp is 0, too
  int64_t cp = 1;   ///< context parallel; of this and the next size only 1 is supported
  int64_t pp = 1;   ///< pipeline parallel
  int64_t ep = 1;   ///< expert parallel: ranks that the experts are split over; 1 for a model without experts
  int64_t etp = 0;  ///< expert-tensor parallel; 0: tp / ep where ep divides tp, else 1; not read without experts
  bool sequence_parallel = true;
  EmbeddingSharding embedding_sharding = EmbeddingSharding::kVocab;       ///< vocab or hidden
  ProjectorSharding projector_sharding = ProjectorSharding::kReplicated;  ///< replicated, column or row
  InsertExchange exchange = InsertExchange::kFused;                       ///< fused or all-gather
  /// What tp shares out of the vision tower: data, whole pictures; or weights, whose heads and mlp_width tp divides.
  MmEncoderTpMode mm_encoder_tp_mode = MmEncoderTpMode::kData;
};

/// Either `directory` or `sets` is required.
struct DataSection {
  std::string directory;   ///< one folder for scan_captioned_pictures
  DataSetSections sets;    ///< several data sets and their weights: data_sets_from_text
  double held_out = 0.05;  ///< fraction of the samples that is never trained on, in [0, 1)
  /// Fraction of the pictures that may be unreadable, in [0, 1]; never all of them. In data sets of other kinds than
  /// captions, for each sample one picture is counted.
  double max_unreadable = 0.5;
  std::string tokenizer;           ///< a SentencePiece model; empty: that of model.from, or one is trained on the texts
  int64_t vocabulary_size = 1000;  ///< pieces of the tokenizer that is trained
  bool crops = false;              ///< cut large pictures into crops besides the global view
  int64_t crop_side = 504;         ///< pixels; ignored without crops
  int64_t max_side = 3024;         ///< pixels; larger pictures are scaled down
  /// A folder of `step37 features`, which takes the place of pictures and frozen vision tower while training; relative
  /// to the working directory. Empty: the tower runs.
  std::string features;
  /// What becomes of samples that are longer than training.sequence_length: drop, or extend (a longer pack for each).
  OversizePolicy oversize = OversizePolicy::kDrop;
  bool balance = true;           ///< BatchLoaderOptions::pack_cost: replicas get packs of similar cost
  int64_t decoding_threads = 1;  ///< of a rank, to decode pictures
};

/// The shape keys, which are all but those that say "training" and init_std, config and freeze_*, are taken from
/// `config` where that is given; they are refused then, as are those of VisionSection.
struct ModelSection {
  /// A published config.json that gives the shape. In a file: relative to the folder of this file; in an override:
  /// relative to the working directory. Kept as an absolute path. Empty: the keys below give the shape.
  std::string config;
  /// A published checkpoint that gives shape and weights; relative as `config`. A folder with config.json alone gives
  /// the shape, and training starts from random weights. A run that resumes doesn't read it again.
  std::string from;
  /// Whether the embedding row of the padding token is trained; default: not with `from`, as published.
  bool train_padding_row = true;
  int64_t hidden_size = 0;                  ///< required, as all that say so, unless `config` is given
  int64_t num_layers = 0;                   ///< required
  int64_t head_dim = 0;                     ///< required
  int64_t num_attention_heads = 0;          ///< required: query heads of a full-attention layer
  int64_t num_sliding_attention_heads = 0;  ///< required: query heads of a sliding-window layer
  int64_t num_query_groups = 0;             ///< required: key/value heads of every layer
  int64_t ffn_hidden_size = 0;              ///< required
  int64_t sliding_window = 0;               ///< required: positions a token attends to in a sliding-window layer
  int64_t full_attention_interval = 4;      ///< k: layers 0, k, 2k, ... have full attention
  double rope_theta = 5e6;                  ///< of full-attention layers
  double partial_rotary_factor = 0.5;       ///< of full-attention layers; sliding-window layers rotate whole heads
  double sliding_rope_theta = 1e4;
  double rms_norm_eps = 1e-5;
  bool projector_bias = false;
  int64_t num_moe_experts = 0;                      ///< experts of a layer; 0: every feed-forward is dense
  int64_t moe_first_layer = 0;                      ///< layers from here on have experts
  int64_t moe_router_topk = 2;                      ///< experts of a token
  int64_t moe_ffn_hidden_size = 0;                  ///< of one expert; above 0 if there are experts
  int64_t moe_shared_expert_intermediate_size = 0;  ///< of the expert that sees every token; 0: there is none
  double moe_router_topk_scaling_factor = 1.0;      ///< of the sum of the experts' outputs
  bool moe_router_in_float32 = true;                ///< whether the router computes in float32 whatever the weights are
  /// Layers of multi-token prediction behind the decoder, each a sliding-window layer with a dense feed-forward.
  int64_t mtp_num_layers = 0;
  double mtp_loss_scaling_factor = 0.0;  ///< training: of their mean loss; 0: they aren't trained
  bool mtp_chain_after_norm = false;     ///< training: TransformerConfig's; no published file says which it is
  // Training of the experts; RouterStatistics::losses has the formulas, ExpertBalance the rule of the bias. These may
  // change when a run is resumed.
  double moe_aux_loss_coeff = 0.0;            ///< training: of the load-balancing loss over all experts; 0: none
  double moe_group_balance_loss_coeff = 0.0;  ///< training: of the balance loss over groups of experts; 0: none
  int64_t moe_group_balance_groups = 1;       ///< training: groups of that loss, a divisor of the number of experts
  double moe_z_loss_coeff = 0.0;              ///< training: of the mean square of the router's logsumexp; 0: none
  double moe_router_bias_update_rate = 0.0;   ///< training: of the correction biases, once a step; 0: they stay
  double init_std = 0.02;                     ///< default with `config`: what that says
  bool freeze_language_model = false;
  bool freeze_projector = false;
  bool freeze_router = false;
};

/// VisionConfig's own keys are image_size, width, layers, heads and mlp_width, all required, and patch_size: shape
/// keys.
struct VisionSection : VisionConfig {
  bool freeze = false;
};

/// What is computed again in the backward pass instead of being kept for it: `none`, `full`, or parts by name, as "mlp,
/// tower".
struct Recompute {
  bool full = false;  ///< each layer of the decoder and of multi-token prediction, and each block of the tower
  bool core_attention = false;  ///< of decoder layers, as all but the last: RecomputedParts
  bool mlp = false;
  bool experts = false;
  bool norms = false;
  bool tower = false;  ///< each block of the vision tower
};

/// How many positions' logits exist at a time in a loss (linear_cross_entropy): `auto` or a number; 0: all.
struct LossChunk {
  std::optional<int64_t> positions;  ///< nullopt: default_loss_chunk, with the columns that parallel.tp leaves a rank
};

/// The members of AdamWOptions are keys, too (exp_avg and exp_avg_sq are float32 or bfloat16); scales are written as
/// "vision_model: 0.1, language_model.embedding: 2".
struct TrainingSection : AdamWOptions {
  int64_t steps = 0;  ///< required: optimizer steps of the whole run
  int64_t seed = 1234;
  int64_t global_batch_size = 1;   ///< packs per step, over all replicas
  int64_t micro_batch_size = 1;    ///< packs in one forward and backward pass
  int64_t sequence_length = 2048;  ///< positions of a pack
  double learning_rate = 1e-3;     ///< at the end of the warm-up
  double min_learning_rate = 0.0;  ///< at the last step
  int64_t warmup_steps = 0;
  LearningRateDecay learning_rate_decay = LearningRateDecay::kCosine;  ///< or linear, constant, wsd
  int64_t decay_steps = 0;      ///< wsd: number of last steps in which the rate decays
  double clip_grad_norm = 1.0;  ///< 0: no clipping
  /// float32, or bfloat16: parameters, activations and what is sent of them; the optimizer updates float32 copies.
  at::ScalarType precision = at::kFloat;
  at::ScalarType main_gradients =
      at::kFloat;                      ///< what gradients of bfloat16 parameters are added up in: float32 or bfloat16
  bool distributed_optimizer = false;  ///< GradientBufferOptions::distributed_optimizer
  bool overlap_gradient_reduction = true;  ///< GradientBufferOptions::overlap_reduction
  bool overlap_parameter_gather = true;    ///< GradientBufferOptions::overlap_gather
  int64_t bucket_elements = 40'000'000;    ///< GradientBufferOptions::bucket_elements
  int64_t check_replicas = 0;              ///< steps between two comparisons of the replicas' parameters; 0: none
  NotFiniteAction not_finite = NotFiniteAction::kStop;  ///< stop or skip; TrainerOptions::not_finite
  int64_t max_skipped_steps = 10;                       ///< in a row; one more ends the run
  double loss_spike = 10.0;  ///< deviations above the last losses from which a loss is reported (LossSpikes); 0: never
  Recompute recompute;       ///< changes no bit of the results
  LossChunk loss_chunk;      ///< changes results by rounding only
};

struct ValidationSection {
  int64_t interval = 0;          ///< steps; 0: at the end only
  std::optional<int64_t> packs;  ///< number of packs of held-out pictures; nullopt, written `all`: all packs
};

/// What becomes of a run that can't write a checkpoint or its metrics.
enum class WriteErrorAction {
  kStop,      ///< it ends
  kContinue,  ///< it goes on, after a warning, and tries again later; its last checkpoint must be written
};

struct CheckpointSection {
  int64_t interval = 0;  ///< steps; 0: at the end only
  int64_t keep = 2;      ///< number of newest checkpoints to keep
  /// Write while training goes on (CheckpointSaver). The files are the same; it takes a copy of a rank's file in host
  /// memory.
  bool asynchronous = true;
  WriteErrorAction on_error = WriteErrorAction::kStop;  ///< stop or continue; of metrics.jsonl, too
  bool pass_over_damaged = false;  ///< resume from an older checkpoint if files of the newest are damaged
  std::string export_to;  ///< written as `export`: folder for the last step in the published layout, relative to
                          ///< run.directory; empty: none
};

struct ReportSection {
  int64_t pictures = 12;  ///< shown in report.html with their captions
  int64_t max_new_tokens = 32;
  bool tensorboard = true;  ///< metrics as TensorBoard event files, too
};

struct RunConfig {
  RunSection run;
  ParallelSection parallel;
  DataSection data;
  ModelSection model;
  VisionSection vision;
  TrainingSection training;
  ValidationSection validation;
  CheckpointSection checkpoint;
  ReportSection report;
  /// What model.config or model.from says; vision repeats its part of it; not a setting.
  std::optional<PublishedConfig> published;
  std::optional<PublishedForm> published_form;  ///< to write it again; not a setting
  std::vector<std::string> warnings;            ///< one for each key that was given by its old name; not a setting
};

/// Reads a YAML file of sections, then applies `overrides`, "section.key=value" each, in order; later ones win. The
/// text after the first '=' is the value, without YAML's quotes or escapes. tp, cp, ep, etp, dp and pp are short for
/// parallel.tp and so on in overrides. Only the types of values are checked: call validate(). Old names of keys are
/// accepted, too (RunConfig::warnings). Not collective.
/// @throws c10::ValueError naming the key, and file and line or the override:
///         a file that can't be read or isn't YAML; a section or key that doesn't exist (with the most similar name),
///         is given twice in the file, or by both its names in the file or the overrides; a value of another type;
///         an override without '='; a required key that is missing; what read_published_config throws; a shape key
///         beside model.config.
RunConfig load_run_config(const std::filesystem::path& path, const std::vector<std::string>& overrides = {});

/// The configuration from `key_values`, "section.key=value" each, without a file: the settings() in a checkpoint. Not
/// collective.
/// @throws c10::ValueError as load_run_config does for overrides.
///         Also if model.config or model.from is given without `form`, or what PublishedForm::model throws.
/// @param form  gives the shape; the files that the settings name aren't read.
RunConfig run_config_from_settings(const std::vector<std::string>& key_values,
                                   const std::optional<PublishedForm>& form = std::nullopt);

/// Every key, "section.key", with its value, section by section; no shape keys if model.config is given. As overrides
/// "key=value" of any file (without shape keys then) they give the same configuration.
std::vector<std::pair<std::string, std::string>> settings(const RunConfig& config);

/// Checks everything that can be checked before the data are read. Not collective.
/// @throws c10::ValueError naming the key and the numbers:
///         what rank_grid refuses; an unknown device; numbers that are too small; global_batch_size not divisible by
///         micro_batch_size * dp; sequence_length not divisible by tp under sequence parallelism, or too short for one
///         picture; a directory that starts with ~; held_out outside [0, 1); picture sizes that don't fit the tower; a
///         vocabulary larger than model.config has; recomputed parts that keep nothing; and the errors of validate() of
///         schedule, AdamW, crops and model.
void validate(const RunConfig& config, int num_ranks);

/// The sizes of ParallelSection for `num_ranks` ranks, with zeros filled in; without experts ep is 1 and etp not given.
/// @throws c10::ValueError with the numbers if an unsupported kind of parallelism is asked for, tp * dp isn't
///         num_ranks, ep * etp doesn't divide it, or ep is above 1 without experts.
parallel::RankGrid rank_grid(const RunConfig& config, int num_ranks);

/// The model, with a vocabulary of `vocabulary_size` pieces (the tokenizer's, which may be below data.vocabulary_size),
/// or that of model.config if it is given.
/// Gradients accumulate into their buffers (TransformerExecution::accumulate_into_grad).
Step37Config model_config(const RunConfig& config, int64_t vocabulary_size);

/// ", the loss in chunks of 256 positions", or nothing for 0.
std::string loss_text(int64_t loss_chunk);

LearningRateSchedule learning_rate_schedule(const RunConfig& config);

/// How gradients are added up and reduced. Not collective.
GradientBufferOptions gradient_buffer_options(const TrainingSection& training);

/// How pictures are cut. Without data.crops, crop_side is the global side, so that it always fits the patches.
CropOptions crop_options(const RunConfig& config);

}  // namespace megatron_cpp::step37
