#include "step37/insert/image_for_insert.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

namespace megatron_cpp::step37 {
namespace {

std::vector<at::Tensor> checked_tensors(const FeatureList& features) {
  std::vector<at::Tensor> tensors;
  if (const auto* tensor = std::get_if<at::Tensor>(&features)) {
    tensors.push_back(*tensor);
  } else {
    tensors = std::get<std::vector<at::Tensor>>(features);
  }
  for (const auto& tensor : tensors) {
    TORCH_CHECK_VALUE(tensor.defined() && (tensor.dim() == 2 || tensor.dim() == 3),
                      "image features must be [L, C] or [N, L, C], got ",
                      tensor.defined() ? c10::str(tensor.sizes()) : "an undefined tensor");
  }
  return tensors;
}

}  // namespace

std::vector<at::Tensor> feature_blocks(const FeatureList& features) {
  std::vector<at::Tensor> blocks;
  for (const auto& tensor : checked_tensors(features)) {
    if (tensor.dim() == 2) {
      blocks.push_back(tensor);
      continue;
    }
    for (int64_t image = 0; image < tensor.size(0); ++image) blocks.push_back(tensor.select(0, image));
  }
  return blocks;
}

namespace internal {

std::vector<at::Tensor> feature_tensors(const ImageForInsert& group) {
  TORCH_CHECK_VALUE(group.image_features.has_value(), "the group of start token ", group.insert_start_token,
                    " has no image_features: the vision tower has to run first");
  return checked_tensors(*group.image_features);
}

std::vector<int64_t> rows_of(const ImageForInsert& group) {
  if (group.held) return to_vector(group.held->num_rows, "num_rows", group);
  std::vector<int64_t> rows;
  for (const auto& tensor : feature_tensors(group)) {
    const int64_t num_images = tensor.dim() == 2 ? 1 : tensor.size(0);
    rows.insert(rows.end(), static_cast<size_t>(num_images), tensor.size(-2));
  }
  return rows;
}

std::vector<int64_t> to_vector(const at::Tensor& values, const char* what, const ImageForInsert& group) {
  const bool fits = values.defined() && values.dim() == 1 && values.scalar_type() == at::kLong && values.is_cpu();
  TORCH_CHECK_VALUE(fits, what, " of start token ", group.insert_start_token, " must be [N] int64 on the CPU, got ",
                    values.defined() ? c10::str(values.sizes(), " ", values.scalar_type()) : "an undefined tensor");
  const auto contiguous = values.contiguous();
  const auto* data = contiguous.const_data_ptr<int64_t>();
  return {data, data + contiguous.numel()};
}

}  // namespace internal

}  // namespace megatron_cpp::step37
