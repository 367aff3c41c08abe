#include "step37/image_for_insert.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

namespace step37 {
namespace internal {

std::vector<at::Tensor> feature_tensors(const FeatureList& features) {
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

}  // namespace internal

std::vector<at::Tensor> feature_blocks(const FeatureList& features) {
  std::vector<at::Tensor> blocks;
  for (const auto& tensor : internal::feature_tensors(features)) {
    if (tensor.dim() == 2) {
      blocks.push_back(tensor);
      continue;
    }
    for (int64_t image = 0; image < tensor.size(0); ++image) blocks.push_back(tensor.select(0, image));
  }
  return blocks;
}

}  // namespace step37
