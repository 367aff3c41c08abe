#include "step37/image_for_insert.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

namespace step37 {
namespace {

void append_blocks(const at::Tensor& features, std::vector<at::Tensor>& blocks) {
  TORCH_CHECK_VALUE(features.defined() && (features.dim() == 2 || features.dim() == 3),
                    "image features must be [L, C] or [N, L, C], got ",
                    features.defined() ? c10::str(features.sizes()) : "an undefined tensor");
  if (features.dim() == 2) {
    blocks.push_back(features);
    return;
  }
  for (int64_t image = 0; image < features.size(0); ++image) blocks.push_back(features.select(0, image));
}

}  // namespace

std::vector<at::Tensor> feature_blocks(const FeatureList& features) {
  std::vector<at::Tensor> blocks;
  if (const auto* tensor = std::get_if<at::Tensor>(&features)) {
    append_blocks(*tensor, blocks);
  } else {
    for (const auto& entry : std::get<std::vector<at::Tensor>>(features)) append_blocks(entry, blocks);
  }
  return blocks;
}

}  // namespace step37
