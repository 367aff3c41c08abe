#include "step37/data/caption_batches.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <system_error>
#include <utility>

#include "megatron_cpp/tensor_parallel/to_device.h"
#include "parallel/agree.h"
#include "parallel/shard.h"
#include "step37/data/picture.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

using Json = nlohmann::json;

int64_t patches_of(int64_t side, const CropOptions& crops) {
  const int64_t per_side = side / crops.vision_patch_size;
  return per_side * per_side;
}

template <class Value>
std::vector<Value> values_of(const at::Tensor& tensor) {
  const auto* data = tensor.const_data_ptr<Value>();
  return {data, data + tensor.numel()};
}

template <class Value>
at::Tensor tensor_of(const Json& json, at::IntArrayRef shape, at::ScalarType dtype) {
  const auto values = json.get<std::vector<Value>>();
  return at::from_blob(const_cast<Value*>(values.data()), shape, dtype).clone();
}

Json to_json(const CaptionPack& pack) {
  auto pictures = Json::array();
  for (const auto& [path, width, height, bytes, modified, offset] : pack.pictures) {
    pictures.push_back({path, width, height, bytes, modified, offset});
  }
  return {{"tokens", values_of<int64_t>(pack.packed.tokens)},
          {"labels", values_of<int64_t>(pack.packed.labels)},
          {"loss_mask", values_of<int64_t>(pack.packed.loss_mask)},
          {"position_ids", values_of<int64_t>(pack.packed.position_ids)},
          {"cu_seqlens", values_of<int32_t>(pack.packed.cu_seqlens)},
          {"padding_mask", values_of<int64_t>(pack.packed.padding_mask)},
          {"pictures", std::move(pictures)}};
}

CaptionPack pack_from_json(const Json& json) {
  CaptionPack pack;
  const auto S = static_cast<int64_t>(json.at("tokens").size());
  pack.packed.tokens = tensor_of<int64_t>(json.at("tokens"), {1, S}, at::kLong);
  pack.packed.labels = tensor_of<int64_t>(json.at("labels"), {1, S}, at::kLong);
  pack.packed.loss_mask = tensor_of<int64_t>(json.at("loss_mask"), {1, S}, at::kLong);
  pack.packed.position_ids = tensor_of<int64_t>(json.at("position_ids"), {1, S}, at::kLong);
  const auto ends = static_cast<int64_t>(json.at("cu_seqlens").size());
  pack.packed.cu_seqlens = tensor_of<int32_t>(json.at("cu_seqlens"), {ends}, at::kInt);
  pack.packed.padding_mask = tensor_of<int64_t>(json.at("padding_mask"), {1, S}, at::kLong);
  for (const auto& picture : json.at("pictures")) {
    pack.pictures.push_back({picture[0], picture[1], picture[2], picture[3], picture[4], picture[5]});
  }
  return pack;
}

/// Sends `step` of tensor-parallel rank 0 to every rank of the group.
CaptionStep broadcast_step(const CaptionStep& step, const parallel::GroupPtr& tp) {
  if (tp->getSize() == 1) return step;
  std::string bytes;
  if (tp->getRank() == 0) {
    auto packs = Json::array();
    for (const auto& pack : step.micro_batches) packs.push_back(to_json(pack));
    const Json json{{"packs", std::move(packs)},
                    {"counts", {step.num_loss_tokens, step.num_tokens, step.num_pictures}},
                    {"next", {step.next.epoch, step.next.position}}};
    Json::to_cbor(json, bytes);
  }
  bytes = parallel::broadcast_text(bytes, 0, tp);
  const auto json = Json::from_cbor(bytes);
  CaptionStep result;
  for (const auto& pack : json.at("packs")) result.micro_batches.push_back(pack_from_json(pack));
  result.num_loss_tokens = json.at("counts")[0];
  result.num_tokens = json.at("counts")[1];
  result.num_pictures = json.at("counts")[2];
  result.next = {json.at("next")[0], json.at("next")[1]};
  return result;
}

/// Adds a pack to the counts of a step, and, if it belongs to this data-parallel rank, as a micro-batch.
void add_pack(CaptionStep& step, CaptionPack pack, bool own) {
  step.num_loss_tokens += pack.packed.loss_mask.sum().item<int64_t>();
  // The padding is a sub-sequence of its own, the last one; without padding there is none.
  const auto ends = values_of<int32_t>(pack.packed.cu_seqlens);
  step.num_tokens += ends[pack.pictures.size()];
  step.num_pictures += static_cast<int64_t>(pack.pictures.size());
  if (own) step.micro_batches.push_back(std::move(pack));
}

/// Whether some copy of the experts is on ranks of several data-parallel replicas.
bool experts_span_replicas(const parallel::ProcessGroups& groups) {
  return groups.etp_ep && groups.tp->getSize() % groups.etp_ep->getSize() != 0;
}

/// Concatenates each `size` packs into one. The number of packs is a multiple of `size`.
std::vector<CaptionPack> concatenated(std::vector<CaptionPack> packs, int64_t size) {
  if (size == 1) return packs;
  std::vector<CaptionPack> result;
  for (auto pack = packs.begin(); pack != packs.end();) {
    std::vector<PackedBatch> sequences;
    std::vector<PictureReference> pictures;
    for (int64_t i = 0; i < size; ++i, ++pack) {
      sequences.push_back(pack->packed);
      pictures.insert(pictures.end(), pack->pictures.begin(), pack->pictures.end());
    }
    result.push_back({concatenate(sequences), std::move(pictures)});
  }
  return result;
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
PictureViews views_of(const PictureReference& reference, const SampleFormat& format,
                      const std::filesystem::path& folder, PictureFaults& faults) {
  using Kind = PictureFaults::Kind;
  const auto file = folder / reference.path;
  const auto note = [&](Kind kind, const std::string& text) { faults.note(reference.path, kind, text); };
  if (faults.watches_changes() && has_changed(reference, file)) {
    note(Kind::kChanged, fmt::format("picture {} or its caption has changed since the run looked for pictures, and "
                                     "others may have: the next start looks at all of them again",
                                     printable(file.string())));
  }
  const auto decoded = decode_picture(file);
  auto pixels = decoded.pixels;
  if (!decoded.ok()) {
    note(Kind::kUnreadable, decoded.error + ": a black picture takes its place");
  } else if (pixels.size(1) != reference.height || pixels.size(2) != reference.width) {
    note(Kind::kUnreadable, fmt::format("picture {} is not {} x {} as its header said: a black picture takes its place",
                                        printable(file.string()), reference.width, reference.height));
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

SampleFormat caption_format(const Tokenizer& tokenizer, const CropOptions& crops) {
  SampleFormat format;
  format.tokenizer = &tokenizer;
  format.crops = crops;
  format.picture_ids = {tokenizer.id_of("<im_start>"),  tokenizer.id_of("<im_patch>"),
                        tokenizer.id_of("<im_end>"),    tokenizer.id_of("<patch_start>"),
                        tokenizer.id_of("<patch_end>"), tokenizer.id_of("<patch_newline>")};
  format.begin_id = tokenizer.bos_id();
  format.end_id = tokenizer.eos_id();
  return format;
}

std::vector<int64_t> prompt_tokens(const std::vector<PictureReference>& pictures, const SampleFormat& format) {
  std::vector<int64_t> tokens;
  if (format.begin_id) tokens.push_back(*format.begin_id);
  for (const auto& picture : pictures) {
    const auto plan = plan_crops(picture.width, picture.height, format.crops);
    const auto of_picture = picture_tokens(plan, format.crops, format.picture_ids);
    tokens.insert(tokens.end(), of_picture.begin(), of_picture.end());
  }
  return tokens;
}

Sample caption_sample(const PictureReference& picture, const std::vector<int64_t>& caption,
                      const SampleFormat& format) {
  Sample sample;
  sample.tokens = prompt_tokens({picture}, format);
  sample.loss_mask.assign(sample.tokens.size(), 0);
  sample.tokens.insert(sample.tokens.end(), caption.begin(), caption.end());
  sample.tokens.push_back(format.end_id);
  sample.loss_mask.resize(sample.tokens.size(), 1);
  return sample;
}

PictureReference reference_to(const std::filesystem::path& folder, const std::string& path, int64_t side) {
  const auto header = read_picture_header(folder / path);
  return header.ok() ? PictureReference{path, header.size.width, header.size.height}
                     : PictureReference{path, side, side};
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

std::vector<ImageForInsert> load_pictures(const CaptionPack& pack, const SampleFormat& format,
                                          const std::filesystem::path& folder, MmEncoderTpMode mode,
                                          const parallel::GroupPtr& tp, PictureFaults& faults) {
  const bool shares_out = mode == MmEncoderTpMode::kData;
  const int rank = tp->getRank();
  const auto holders = shares_out ? assign_pictures(pack.pictures, format.crops, tp->getSize())
                                  : std::vector<int64_t>(pack.pictures.size(), rank);
  std::vector<int64_t> crop_holders;
  std::vector<at::Tensor> global_views;
  std::vector<at::Tensor> crop_views;
  for (size_t i = 0; i < pack.pictures.size(); ++i) {
    const auto& picture = pack.pictures[i];
    const auto num_crops = static_cast<size_t>(plan_crops(picture.width, picture.height, format.crops).num_crops());
    crop_holders.insert(crop_holders.end(), num_crops, holders[i]);
    if (holders[i] != rank) continue;
    const auto views = views_of(picture, format, folder, faults);
    global_views.push_back(views.global);
    if (num_crops > 0) crop_views.push_back(views.crops);
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

Step37Batch to_model_batch(const CaptionPack& pack, std::vector<ImageForInsert> images, const at::Device& device) {
  for (auto& group : images) group.images = normalize(megatron_cpp::internal::to_device(group.images, device));
  return {.input_ids = pack.packed.tokens,
          .labels = pack.packed.labels,
          .attention = {pack.packed.position_ids, pack.packed.cu_seqlens},
          .images = std::move(images),
          .padding_mask = pack.packed.padding_mask};
}

CaptionLoader::CaptionLoader(Options options, Source source, const parallel::ProcessGroups& groups,
                             const SamplerState& start, PictureFaults& faults)
    : options_(std::move(options)),
      source_(std::move(source)),
      groups_(groups),
      sampler_(std::max<int64_t>(1, static_cast<int64_t>(source_.pictures.size())), SampleOrder::kShuffled,
               options_.seed),
      packer_(options_.packing),
      faults_(faults) {
  const int64_t packs = parallel::even_shard_size(options_.global_batch_size, groups_.dp->getSize(),
                                                  "global batch size", "data-parallel");
  TORCH_CHECK_VALUE(options_.micro_batch_size >= 1 && packs % options_.micro_batch_size == 0, "a data-parallel rank's ",
                    packs, " packs a step are not divisible by micro-batch size ", options_.micro_batch_size);
  parallel::agree_on(
      [&] {
        if (groups_.tp->getRank() != 0) return;
        TORCH_CHECK_VALUE(!source_.pictures.empty(), "there is no picture to train on");
        sampler_.restore(start);
      },
      groups_.tp);
  prefetch();
}

CaptionLoader::~CaptionLoader() {
  if (ahead_.valid()) ahead_.wait();
}

CaptionStep CaptionLoader::make_step() {
  const auto own = parallel::even_shard(options_.global_batch_size, groups_.dp->getSize(), groups_.dp->getRank(),
                                        "global batch size", "data-parallel");
  CaptionStep step;
  int64_t pack_number = 0;
  int64_t dropped_in_a_row = 0;
  while (pack_number < options_.global_batch_size) {
    const auto before = sampler_.state();
    const auto index = static_cast<size_t>(sampler_.next());
    const auto& picture = source_.pictures[index];
    const auto result = packer_.add(caption_sample(picture, source_.captions[index], options_.format));
    if (result == SamplePacker::Result::kAdded) {
      open_pictures_.push_back(picture);
      dropped_in_a_row = 0;
    } else if (result == SamplePacker::Result::kFull) {
      add_pack(step, {packer_.finish(), std::exchange(open_pictures_, {})}, own.contains(pack_number));
      ++pack_number;
      sampler_.restore(before);  // the sample goes into the next pack, which may be in the next step
    } else {
      ++dropped_in_a_row;
      TORCH_CHECK_VALUE(dropped_in_a_row <= sampler_.num_samples(), "no sample fits a pack of ",
                        options_.packing.max_length, " positions");
    }
  }
  step.micro_batches = concatenated(std::move(step.micro_batches), options_.micro_batch_size);
  step.next = sampler_.state();
  return step;
}

void CaptionLoader::prefetch() {
  CaptionStep step;
  parallel::agree_on(
      [&] {
        if (groups_.tp->getRank() == 0) step = make_step();
      },
      groups_.tp);
  step = broadcast_step(step, groups_.tp);
  ahead_ = std::async(std::launch::async, [step = std::move(step), this]() mutable {
    LoadedStep loaded;
    for (const auto& pack : step.micro_batches) {
      auto images =
          load_pictures(pack, options_.format, options_.folder, options_.mm_encoder_tp_mode, groups_.tp, faults_);
      if (options_.device.is_cuda()) {
        for (auto& group : images) group.images = group.images.pin_memory();
      }
      loaded.images.push_back(std::move(images));
    }
    loaded.step = std::move(step);
    return loaded;
  });
}

CaptionLoader::LoadedStep CaptionLoader::next() {
  auto loaded = ahead_.get();
  faults_.share(groups_.world);
  if (faults_.any_changed() && groups_.world->getRank() == 0) {
    std::error_code ignored;
    std::filesystem::remove(options_.index, ignored);
  }
  TORCH_CHECK_VALUE(faults_.num_unreadable() <= options_.max_unreadable, faults_.num_unreadable(),
                    " more pictures can't be read, which is more than data.max_unreadable allows (first: ",
                    faults_.first_unreadable(), ")");
  prefetch();
  return loaded;
}

CaptionStep pack_once(const CaptionLoader::Source& source, const std::optional<int64_t>& max_packs,
                      const CaptionLoader::Options& options, const parallel::ProcessGroups& groups) {
  CaptionStep step;
  if (groups.tp->getRank() == 0) {
    std::vector<Sample> samples;
    for (size_t i = 0; i < source.pictures.size(); ++i) {
      samples.push_back(caption_sample(source.pictures[i], source.captions[i], options.format));
    }
    const auto packed = pack(samples, options.packing);
    const auto num_packs = std::min<size_t>(packed.batches.size(), static_cast<size_t>(max_packs.value_or(1LL << 40)));
    for (size_t i = 0; i < num_packs; ++i) {
      CaptionPack pack{packed.batches[i], {}};
      for (const int64_t sample : packed.samples[i])
        pack.pictures.push_back(source.pictures[static_cast<size_t>(sample)]);
      const auto dp_size = static_cast<size_t>(groups.dp->getSize());
      add_pack(step, std::move(pack), i % dp_size == static_cast<size_t>(groups.dp->getRank()));
    }
    // Ranks that share out experts with other replicas run every micro-batch together with them.
    const auto rounds =
        (num_packs + static_cast<size_t>(groups.dp->getSize()) - 1) / static_cast<size_t>(groups.dp->getSize());
    if (experts_span_replicas(groups) && step.micro_batches.size() < rounds) {
      CaptionPack idle{packed.batches[0], {}};
      for (const int64_t sample : packed.samples[0]) {
        idle.pictures.push_back(source.pictures[static_cast<size_t>(sample)]);
      }
      idle.packed.labels = at::full_like(idle.packed.labels, kIgnoreIndex);
      step.micro_batches.push_back(std::move(idle));
    }
  }
  return broadcast_step(step, groups.tp);
}

}  // namespace megatron_cpp::step37
