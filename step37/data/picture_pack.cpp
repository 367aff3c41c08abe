#include "step37/data/picture_pack.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <filesystem>
#include <system_error>
#include <utility>

#include "megatron_cpp/tensor_parallel/to_device.h"
#include "parallel/shard.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/for_each_index.h"
#include "step37/data/picture.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

int64_t patches_of(int64_t side, const CropOptions& crops) {
  const int64_t per_side = side / crops.vision_patch_size;
  return per_side * per_side;
}

/// Whether the picture file or its caption file has changed since the folder was searched.
bool has_changed(const PictureReference& reference, const std::filesystem::path& file) {
  if (reference.modified == 0) return false;
  const auto caption = std::filesystem::path(file).replace_extension(".txt");
  std::error_code error;
  const auto bytes = static_cast<int64_t>(std::filesystem::file_size(file, error));
  return (!error && bytes != reference.bytes) || modification_time(file) > reference.modified ||
         modification_time(caption) > reference.modified;
}

/// The views of one picture as uint8, black if the file is broken.
PictureViews views_of(const PictureReference& reference, const SampleFormat& format, PictureFaults& faults) {
  using Kind = PictureFaults::Kind;
  const std::filesystem::path file = reference.path;
  const auto note = [&](Kind kind, const std::string& text) {
    faults.note(picture_name(reference.path, reference.place), kind, text);
  };
  if (faults.watches_changes() && has_changed(reference, file)) {
    note(Kind::kChanged, fmt::format("picture {} or its caption has changed since the run looked for pictures, and "
                                     "others may have: the next start looks at all of them again",
                                     printable(file.string())));
  }
  const auto decoded = decode_picture(file, reference.place);
  auto pixels = decoded.pixels;
  if (!decoded.ok()) {
    note(Kind::kUnreadable, decoded.error + ": a black picture takes its place");
  } else if (pixels.size(1) != reference.height || pixels.size(2) != reference.width) {
    note(Kind::kUnreadable, fmt::format("picture {} is not {} x {} as its header said: a black picture takes its place",
                                        picture_name(file, reference.place), reference.width, reference.height));
    pixels.reset();
  } else if (!decoded.damage.empty()) {
    note(Kind::kDamaged, decoded.damage + ": what is left of it is used");
  }
  if (!pixels.defined()) pixels = black_picture(reference.height, reference.width);
  return cut_views(pixels, plan_crops(reference.width, reference.height, format.crops), format.crops);
}

ImageForInsert group_of(int64_t token, int64_t side, const std::vector<at::Tensor>& views,
                        const std::vector<int64_t>& holders, int64_t rows) {
  ImageForInsert group;
  group.insert_start_token = token;
  group.images = views.empty() ? at::empty({0, 3, side, side}, at::kByte) : at::cat(views);
  group.held = HeldImages{at::full({static_cast<int64_t>(holders.size())}, rows, at::kLong),
                          at::tensor(at::ArrayRef<int64_t>(holders), at::kLong)};
  return group;
}

}  // namespace

SamplePacker::Result PicturePacker::add(const PictureSample& sample, const std::string& name) {
  const auto result = sample.tokens.empty() ? SamplePacker::Result::kDropped : packer_.add(sample);
  if (result == SamplePacker::Result::kAdded) {
    open_.pictures.insert(open_.pictures.end(), sample.pictures.begin(), sample.pictures.end());
    open_.samples.push_back(name);
  }
  return result;
}

PicturePack PicturePacker::finish() {
  open_.packed = packer_.finish();
  return std::exchange(open_, {});
}

std::vector<int64_t> assign_pictures(const std::vector<PictureReference>& pictures, const CropOptions& crops, int t) {
  std::vector<int64_t> costs;
  costs.reserve(pictures.size());
  for (const auto& picture : pictures) {
    const auto plan = plan_crops(picture.width, picture.height, crops);
    costs.push_back(patches_of(crops.global_side, crops) + plan.num_crops() * patches_of(crops.crop_side, crops));
  }
  const auto ranks = parallel::balanced_assignment(costs, t);
  return {ranks.begin(), ranks.end()};
}

std::vector<ImageForInsert> load_pictures(const std::vector<PictureReference>& pictures, const SampleFormat& format,
                                          MmEncoderTpMode mode, const parallel::GroupPtr& tp, PictureFaults& faults,
                                          int64_t num_threads) {
  const bool shares_out = mode == MmEncoderTpMode::kData;
  const int rank = tp->getRank();
  const auto holders =
      shares_out ? assign_pictures(pictures, format.crops, tp->getSize()) : std::vector<int64_t>(pictures.size(), rank);
  std::vector<int64_t> crop_holders;
  std::vector<size_t> own;
  for (size_t i = 0; i < pictures.size(); ++i) {
    const auto plan = plan_crops(pictures[i].width, pictures[i].height, format.crops);
    crop_holders.insert(crop_holders.end(), static_cast<size_t>(plan.num_crops()), holders[i]);
    if (holders[i] == rank) own.push_back(i);
  }
  std::vector<PictureViews> views(own.size());
  for_each_index(own.size(), num_threads, [&](size_t i) { views[i] = views_of(pictures[own[i]], format, faults); });
  std::vector<at::Tensor> global_views;
  std::vector<at::Tensor> crop_views;
  for (const auto& of_picture : views) {
    global_views.push_back(of_picture.global);
    if (of_picture.crops.size(0) > 0) crop_views.push_back(of_picture.crops);
  }
  std::vector<ImageForInsert> groups;
  if (!crop_holders.empty()) {
    groups.push_back(group_of(format.picture_ids.patch_start, format.crops.crop_side, crop_views, crop_holders,
                              format.crops.crop_tokens()));
  }
  groups.push_back(group_of(format.picture_ids.im_start, format.crops.global_side, global_views, holders,
                            format.crops.global_tokens()));
  if (!shares_out) {
    for (auto& group : groups) group.held.reset();
  }
  return groups;
}

Step37Batch to_model_batch(const PackedBatch& packed, std::vector<ImageForInsert> images, const at::Device& device) {
  for (auto& group : images) group.images = normalize(megatron_cpp::internal::to_device(group.images, device));
  return {.input_ids = packed.tokens,
          .labels = packed.labels,
          .attention = {packed.position_ids, packed.cu_seqlens},
          .images = std::move(images),
          .padding_mask = packed.padding_mask};
}

}  // namespace megatron_cpp::step37
