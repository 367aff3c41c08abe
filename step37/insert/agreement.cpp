#include "step37/insert/agreement.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <span>

#include "parallel/agree.h"
#include "parallel/hash.h"

namespace megatron_cpp::step37::internal {
namespace {

/// Equal values have equal hashes on every rank.
int64_t hash_of(std::span<const int64_t> values) {
  return static_cast<int64_t>(parallel::stable_hash(std::as_bytes(values)));
}

int64_t hash_of(const at::Tensor& values) {
  if (!values.defined()) return 0;
  const auto contiguous = values.to(at::kLong).contiguous();
  return hash_of({contiguous.const_data_ptr<int64_t>(), static_cast<size_t>(contiguous.numel())});
}

int64_t trains(const at::Tensor& parameter) { return parameter.defined() && parameter.requires_grad() ? 1 : 0; }

}  // namespace

void check_agreement(const at::Tensor& input_ids, const std::vector<ImageForInsert>& images, const InsertPlan& plan,
                     const LocalFeatures& features, const LanguageModelEmbeddingImpl& words,
                     const AlignProjector& projector, const ImageInsertEmbeddingOptions& options) {
  std::vector<int64_t> tokens;
  std::vector<int64_t> rows;
  std::vector<int64_t> holders;
  for (const auto& group : images) {
    tokens.push_back(group.insert_start_token);
    for (const int64_t image_rows : rows_of(group)) rows.push_back(image_rows);
    holders.push_back(group.held ? 1 : 0);
    holders.push_back(group.held ? hash_of(group.held->holders) : 0);
  }
  std::vector<int64_t> runs;  // a plan from the caller may be made for other ids
  for (const auto& run : plan.runs()) {
    runs.insert(runs.end(), {run.image, run.feature_row, run.batch, run.position, run.length});
  }
  const auto& table = words.word_embeddings->weight;
  const auto& weight = projector.weight;
  parallel::check_equal({{"batch size", input_ids.size(0)},
                         {"sequence length", input_ids.size(1)},
                         {"the hash of input_ids", hash_of(input_ids.cpu())},
                         {"the number of image groups", static_cast<int64_t>(images.size())},
                         {"the hash of start tokens", hash_of(tokens)},
                         {"the hash of the images' row numbers", hash_of(rows)},
                         {"the hash of the images' holders", hash_of(holders)},
                         {"the dtype of the word embedding", static_cast<int64_t>(table.scalar_type())},
                         {"the hash of the plan", hash_of(runs)},
                         {"the width of image features", features.rows.size(-1)},
                         {"the dtype of align_projector", static_cast<int64_t>(features.rows.scalar_type())},
                         {"hidden_size", options.hidden_size()},
                         {"encoder_output_dim", options.encoder_output_dim()},
                         {"the projector's sharding", static_cast<int64_t>(options.projector_sharding())},
                         {"the projector's bias", options.projector_bias() ? 1 : 0},
                         {"the embedding's layout", static_cast<int64_t>(words.layout())},
                         {"the exchange", static_cast<int64_t>(options.exchange())},
                         {"sequence_parallel", words.sequence_parallel() ? 1 : 0},
                         {"gradient mode", at::GradMode::is_enabled() ? 1 : 0},
                         {"whether the word embedding is trained", trains(table)},
                         {"whether align_projector is trained", trains(weight)},
                         {"whether align_projector's bias is trained", trains(projector.bias)},
                         {"whether features are trained", features.rows.requires_grad() ? 1 : 0}},
                        words.tp());
}

}  // namespace megatron_cpp::step37::internal
