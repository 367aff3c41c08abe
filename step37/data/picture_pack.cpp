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
#include "step37/data/picture_features.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

int64_t patches_of(int64_t side, const CropOptions& crops) {
  const int64_t per_side = side / crops.vision_patch_size;
  return per_side * per_side;
}

using Kind = PictureFaults::Kind;

/// Notes whether the picture file or its caption file has changed since the folder was searched.
void note_change(const PictureReference& reference, PictureFaults& faults) {
  if (!faults.watches_changes() || reference.modified == 0) return;
  const std::filesystem::path file = reference.path;
  const auto caption = std::filesystem::path(file).replace_extension(".txt");
  std::error_code error;
  const auto bytes = static_cast<int64_t>(std::filesystem::file_size(file, error));
  const bool has_changed = (!error && bytes != reference.bytes) || modification_time(file) > reference.modified ||
                           modification_time(caption) > reference.modified;
  if (!has_changed) return;
  faults.note(picture_name(reference.path, reference.place), Kind::kChanged,
              fmt::format("picture {} or its caption has changed since the run looked for pictures, and others may "
                          "have: the next start looks at all of them again",
                          printable(file.string())));
}

/// Notes whether the picture file has changed since its features were computed.
void note_change(const PictureReference& reference, const PictureFeatures& features, PictureFaults& faults) {
  if (!faults.watches_changes()) return;
  const auto* stored = features.find(reference);
  const auto now = file_stamp(reference);
  if (stored == nullptr || now.modified == 0 || now == stored->stamp) return;
  faults.note(picture_name(reference.path, reference.place), Kind::kChanged,
              fmt::format("picture {} has changed since its features were computed, and others may have: {}",
                          printable(reference.path), features.remedy()));
}

/// The views of one picture as uint8, black if the file is broken.
PictureViews views_of(const PictureReference& reference, const SampleFormat& format, PictureFaults& faults) {
  const std::filesystem::path file = reference.path;
  const auto note = [&](Kind kind, const std::string& text) {
    faults.note(picture_name(reference.path, reference.place), kind, text);
  };
  note_change(reference, faults);
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

/// Views of several pictures, or their features.
struct LoadedViews {
  at::Tensor crops;
  at::Tensor global;
};

/// [N, 3, side, side] uint8 each.
LoadedViews decode_views(const std::vector<PictureReference>& pictures, const SampleFormat& format,
                         PictureFaults& faults, int64_t num_threads) {
  std::vector<PictureViews> views(pictures.size());
  for_each_index(pictures.size(), num_threads, [&](size_t i) { views[i] = views_of(pictures[i], format, faults); });
  const auto none = [](int64_t side) { return at::empty({0, 3, side, side}, at::kByte); };
  std::vector<at::Tensor> crops{none(format.crops.crop_side)};
  std::vector<at::Tensor> global{none(format.crops.global_side)};
  for (const auto& of_picture : views) {
    crops.push_back(of_picture.crops);
    global.push_back(of_picture.global);
  }
  return {at::cat(crops), at::cat(global)};
}

/// [N, L, C] bfloat16 each.
LoadedViews read_features(const std::vector<PictureReference>& pictures, const SampleFormat& format,
                          PictureFaults& faults, int64_t num_threads) {
  const auto& features = *format.features;
  std::vector<int64_t> first_crop{0};
  for (const auto& picture : pictures) {
    first_crop.push_back(first_crop.back() + plan_crops(picture.width, picture.height, format.crops).num_crops());
  }
  const auto num_pictures = static_cast<int64_t>(pictures.size());
  const LoadedViews loaded{
      at::empty({first_crop.back(), format.crops.crop_tokens(), features.channels()}, at::kBFloat16),
      at::empty({num_pictures, format.crops.global_tokens(), features.channels()}, at::kBFloat16)};
  for_each_index(pictures.size(), num_threads, [&](size_t i) {
    note_change(pictures[i], faults);
    note_change(pictures[i], features, faults);
    features.read(pictures[i], loaded.crops.narrow(0, first_crop[i], first_crop[i + 1] - first_crop[i]),
                  loaded.global.select(0, static_cast<int64_t>(i)));
  });
  return loaded;
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
  std::vector<PictureReference> own;
  for (size_t i = 0; i < pictures.size(); ++i) {
    const auto plan = plan_crops(pictures[i].width, pictures[i].height, format.crops);
    crop_holders.insert(crop_holders.end(), static_cast<size_t>(plan.num_crops()), holders[i]);
    if (holders[i] == rank) own.push_back(pictures[i]);
  }
  const bool has_features = format.features != nullptr;
  const auto loaded = (has_features ? read_features : decode_views)(own, format, faults, num_threads);
  std::vector<ImageForInsert> groups;
  const auto add = [&](int64_t token, const at::Tensor& views, const std::vector<int64_t>& of_rank, int64_t rows) {
    auto& group = groups.emplace_back();
    group.insert_start_token = token;
    if (has_features) {
      group.image_features = views;
    } else {
      group.images = views;
    }
    if (shares_out) {
      group.held = HeldImages{at::full({static_cast<int64_t>(of_rank.size())}, rows, at::kLong),
                              at::tensor(at::ArrayRef<int64_t>(of_rank), at::kLong)};
    }
  };
  if (!crop_holders.empty()) {
    add(format.picture_ids.patch_start, loaded.crops, crop_holders, format.crops.crop_tokens());
  }
  add(format.picture_ids.im_start, loaded.global, holders, format.crops.global_tokens());
  return groups;
}

Step37Batch to_model_batch(const PackedBatch& packed, std::vector<ImageForInsert> images, const at::Device& device) {
  for_each_tensor(images, [&](at::Tensor& tensor) {
    tensor = megatron_cpp::internal::to_device(tensor, device);
    if (tensor.scalar_type() == at::kByte) tensor = normalize(tensor);
  });
  return {.input_ids = packed.tokens,
          .labels = packed.labels,
          .attention = {packed.position_ids, packed.cu_seqlens},
          .images = std::move(images),
          .padding_mask = packed.padding_mask};
}

}  // namespace megatron_cpp::step37
