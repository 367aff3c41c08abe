#include "step37/program/forward_batch.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <span>
#include <string>
#include <utility>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "megatron_cpp/data/packed_batch.h"

namespace megatron_cpp::step37 {
namespace {

/// The input file's tensors.
struct ForwardInput {
  at::Tensor input_ids;                 ///< [B, S]
  at::Tensor labels;                    ///< [B, S], or undefined
  at::Tensor images;                    ///< [N, 3, h, w], or undefined
  at::Tensor patches;                   ///< [P, 3, h, w], or undefined
  std::vector<int64_t> patches_before;  ///< of each image: how many patches come before it
};

at::Tensor read_integers(const SafetensorsFile& file, const std::string& name, int64_t dimensions) {
  const auto tensor = file.read(name);
  TORCH_CHECK_VALUE(tensor.dim() == dimensions && at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false),
                    file.path().string(), ": ", name, " is ", tensor.sizes(), " ", tensor.scalar_type(),
                    ", expected integers in ", dimensions, dimensions == 1 ? " dimension" : " dimensions");
  return tensor.to(at::kLong);
}

at::Tensor read_pixels(const SafetensorsFile& file, const std::string& name) {
  const auto tensor = file.read(name);
  TORCH_CHECK_VALUE(tensor.dim() == 4 && tensor.size(1) == 3 && tensor.is_floating_point(), file.path().string(), ": ",
                    name, " is ", tensor.sizes(), " ", tensor.scalar_type(),
                    ", expected floating point [N, 3, height, width]");
  return tensor;
}

ForwardInput read_input(const std::filesystem::path& path, const PublishedConfig& config) {
  const SafetensorsFile file(path);
  ForwardInput input;
  input.input_ids = read_integers(file, "input_ids", 2);
  TORCH_CHECK_VALUE(input.input_ids.numel() > 0, path.string(), ": input_ids ", input.input_ids.sizes(), " is empty");
  TORCH_CHECK_VALUE(input.input_ids.size(1) <= config.max_position_embeddings, path.string(), ": input_ids has ",
                    input.input_ids.size(1), " positions, the model allows ", config.max_position_embeddings);
  if (file.contains("labels")) {
    input.labels = read_integers(file, "labels", 2);
    TORCH_CHECK_VALUE(input.labels.sizes() == input.input_ids.sizes(), path.string(), ": labels are ",
                      input.labels.sizes(), ", input_ids ", input.input_ids.sizes());
  }
  if (file.contains("pixel_values")) input.images = read_pixels(file, "pixel_values");
  const int64_t num_images = input.images.defined() ? input.images.size(0) : 0;
  input.patches_before.assign(static_cast<size_t>(num_images), 0);
  if (!file.contains("pixel_values_local")) return input;
  input.patches = read_pixels(file, "pixel_values_local");
  const auto counts = read_integers(file, "num_local_patches", 1);
  const bool is_valid = counts.numel() == num_images && (num_images == 0 || counts.min().item<int64_t>() >= 0) &&
                        counts.sum().item<int64_t>() == input.patches.size(0);
  TORCH_CHECK_VALUE(is_valid, path.string(), ": num_local_patches ", counts.sizes(), " with a sum of ",
                    counts.sum().item<int64_t>(), " does not fit ", num_images, " images and ", input.patches.size(0),
                    " patches");
  const auto* count = counts.const_data_ptr<int64_t>();
  input.patches_before.assign(count, count + num_images);
  return input;
}

/// The places s of each batch row b whose id is `placeholder`, as b*S + s.
std::vector<int64_t> placeholders_in(const at::Tensor& input_ids, int64_t placeholder) {
  const auto found = input_ids.reshape({-1}).eq(placeholder).nonzero().reshape({-1});
  return {found.const_data_ptr<int64_t>(), found.const_data_ptr<int64_t>() + found.numel()};
}

/// Where features go: patches are the images 0 .. P-1 of the plan, images the others.
class Placement {
 public:
  Placement(const ForwardInput& input, const PublishedConfig& config)
      : ids_(input.input_ids.contiguous()), placeholder_(config.image_token_id) {
    const auto add = [&](const at::Tensor& pixels, std::vector<int64_t>& rows) {
      if (!pixels.defined()) return;
      rows.assign(static_cast<size_t>(pixels.size(0)), config.vision.feature_rows(pixels.size(2), pixels.size(3)));
    };
    add(input.patches, patch_rows_);
    add(input.images, image_rows_);
    places_ = placeholders_in(ids_, placeholder_);
    int64_t num_rows = 0;
    for (const auto* rows : {&patch_rows_, &image_rows_}) {
      for (const int64_t count : *rows) num_rows += count;
    }
    TORCH_CHECK_VALUE(static_cast<int64_t>(places_.size()) == num_rows, "input_ids has ", places_.size(),
                      " placeholders (id ", placeholder_, "), the pictures have ", num_rows, " rows of features");
  }

  /// b*S + s of each placeholder, in order.
  const std::vector<int64_t>& places() const { return places_; }

  /// Each picture after its start token.
  InsertPlan after_start_tokens(int64_t patch_start, int64_t image_start) const {
    const std::vector<InsertGroup> groups{{patch_start, patch_rows_}, {image_start, image_rows_}};
    auto plan = InsertPlan::build({ids_.const_data_ptr<int64_t>(), static_cast<size_t>(ids_.numel())}, B(), S(), groups,
                                  MismatchPolicy::kError);
    std::vector<int64_t> overwritten;
    for (const int64_t row : plan.embedding_rows()) overwritten.push_back(row % B() * S() + row / B());
    std::sort(overwritten.begin(), overwritten.end());
    const auto [wrong, place] = std::mismatch(overwritten.begin(), overwritten.end(), places_.begin(), places_.end());
    if (wrong == overwritten.end()) return plan;
    const bool is_other_token = place == places_.end() || *wrong < *place;
    const int64_t at = is_other_token ? *wrong : *place;
    TORCH_CHECK_VALUE(false, "input_ids: batch row ", at / S(), ", position ", at % S(), " has id ",
                      ids_.const_data_ptr<int64_t>()[at], ": ",
                      is_other_token ? "expected a placeholder there, in the rows that follow a start token"
                                     : "a placeholder that follows no start token");
  }

  /// The k-th placeholder takes the k-th row, each image's patches before the image.
  InsertPlan by_placeholders(const std::vector<int64_t>& patches_before) const {
    std::vector<int64_t> order;  // numbers of pictures in the plan
    int64_t patch = 0;
    const auto num_patches = static_cast<int64_t>(patch_rows_.size());
    for (size_t image = 0; image < image_rows_.size(); ++image) {
      for (int64_t i = 0; i < patches_before[image]; ++i) order.push_back(patch++);
      order.push_back(num_patches + static_cast<int64_t>(image));
    }
    auto rows = patch_rows_;
    rows.insert(rows.end(), image_rows_.begin(), image_rows_.end());
    std::vector<int64_t> begins{0};
    for (const int64_t count : rows) begins.push_back(begins.back() + count);
    std::vector<InsertRun> runs;
    auto place = places_.begin();
    for (const int64_t picture : order) {
      for (int64_t row = begins[static_cast<size_t>(picture)]; row < begins[static_cast<size_t>(picture) + 1]; ++row) {
        runs.push_back({picture, row, *place / S(), *place % S(), 1});
        ++place;
      }
    }
    return InsertPlan::from_runs(std::move(runs), B(), S(), rows);
  }

 private:
  int64_t B() const { return ids_.size(0); }
  int64_t S() const { return ids_.size(1); }

  at::Tensor ids_;
  int64_t placeholder_;
  std::vector<int64_t> patch_rows_;
  std::vector<int64_t> image_rows_;
  std::vector<int64_t> places_;
};

}  // namespace

ForwardBatch read_forward_batch(const std::filesystem::path& path, const PublishedConfig& config,
                                const ForwardBatchOptions& options, const at::Device& device) {
  const auto input = read_input(path, config);
  const int64_t B = input.input_ids.size(0);
  const int64_t S = input.input_ids.size(1);
  const auto image_start = options.image_start_token ? options.image_start_token : config.image_start_token_id;
  const auto patch_start = options.patch_start_token ? options.patch_start_token : config.patch_start_token_id;
  const Placement placement(input, config);
  ForwardBatch result;
  result.sequence_length = S;
  result.places = placement.places();
  const bool has_patches = input.patches.defined() && input.patches.size(0) > 0;
  // In a text without pictures the ids of start tokens mean nothing.
  const bool has_start_tokens = image_start && (patch_start || !has_patches) && !result.places.empty();
  auto plan = has_start_tokens ? placement.after_start_tokens(patch_start.value_or(-1), *image_start)
                               : placement.by_placeholders(input.patches_before);
  // Causal attention doesn't look at what is appended.
  const int64_t padding = (options.multiple_of - S % options.multiple_of) % options.multiple_of;
  const int64_t pad_id = std::clamp<int64_t>(config.pad_token_id, 0, config.text.vocabulary_size - 1);
  auto& batch = result.batch;
  batch.input_ids = at::constant_pad_nd(input.input_ids, {0, padding}, pad_id);
  batch.attention.position_ids = at::arange(S + padding, at::kLong).unsqueeze(0);
  if (input.labels.defined()) {
    batch.labels = at::constant_pad_nd(input.labels.narrow(1, 1, S - 1), {0, 1 + padding}, kIgnoreIndex);
    result.num_loss_tokens = batch.labels.ne(kIgnoreIndex).sum().item<int64_t>();
    TORCH_CHECK_VALUE(result.num_loss_tokens > 0, path.string(), ": no label counts for the loss");
  }
  for (const auto& pixels : {input.patches, input.images}) {
    if (!pixels.defined()) continue;
    batch.images.push_back({.insert_start_token = -1, .images = pixels.to(device)});
  }
  if (!batch.images.empty()) batch.plan = InsertPlan::from_runs(plan.runs(), B, S + padding, plan.image_rows());
  return result;
}

}  // namespace megatron_cpp::step37
