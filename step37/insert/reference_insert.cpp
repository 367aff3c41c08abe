#include "step37/insert/reference_insert.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include "megatron_cpp/tensor_parallel/rows.h"
#include "step37/insert/plan.h"

namespace megatron_cpp::step37 {

at::Tensor insert_features(const at::Tensor& input_embeddings, const FeatureList& image_features,
                           const at::Tensor& input_ids, int64_t flag) {
  TORCH_CHECK_VALUE(input_embeddings.dim() == 3 && input_ids.dim() == 2 && input_ids.scalar_type() == at::kLong &&
                        input_embeddings.size(0) == input_ids.size(1) && input_embeddings.size(1) == input_ids.size(0),
                    "insert_features: embeddings ", input_embeddings.sizes(), " are not the [S, B, H] of input_ids ",
                    input_ids.sizes());
  InsertGroup group{flag, {}};
  const auto blocks = feature_blocks(image_features);
  for (const auto& block : blocks) group.rows.push_back(block.size(0));
  const auto ids = input_ids.cpu().contiguous();
  const auto plan = InsertPlan::build({ids.const_data_ptr<int64_t>(), static_cast<size_t>(ids.numel())}, ids.size(0),
                                      ids.size(1), {&group, 1}, MismatchPolicy::kTruncate);
  for (const auto& warning : plan.warnings()) TORCH_WARN(warning);
  if (plan.runs().empty()) return input_embeddings;
  const auto indices = row_indices(plan.runs(), plan.B());
  const auto rows =
      megatron_cpp::internal::index_tensors({indices.embedding_rows, indices.feature_rows}, input_embeddings.device());
  const auto features = at::cat(blocks).to(input_embeddings.device(), input_embeddings.scalar_type());
  return input_embeddings.reshape({-1, input_embeddings.size(-1)})
      .index_copy(0, rows[0], features.index_select(0, rows[1]))
      .view(input_embeddings.sizes());
}

}  // namespace megatron_cpp::step37
