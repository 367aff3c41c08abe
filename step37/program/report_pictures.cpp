#include "step37/program/report_pictures.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "parallel/agree.h"
#include "step37/data/batch_loader.h"
#include "step37/program/captioner.h"
#include "step37/program/training_run.h"

namespace megatron_cpp::step37 {
namespace {

/// Of `count` samples, spread evenly, those with a picture.
std::vector<SampleReference> samples_to_show(const std::vector<WeightedDataSet>& sets, int64_t count,
                                             const SampleFormat& format) {
  auto shown = spread_samples(sets, count);
  std::erase_if(shown,
                [&](const auto& chosen) { return chosen.samples->sample(chosen.index, format).pictures.empty(); });
  return shown;
}

}  // namespace

std::vector<ReportPicture> report_pictures(Step37Model& model, const RunConfig& config, const Tokenizer& tokenizer,
                                           const RunData& data, const parallel::ProcessGroups& groups,
                                           const c10::Device& device, PictureFaults& faults) {
  const int64_t half = config.report.pictures / 2;
  std::vector<ReportPicture> shown;
  auto options = captioner_options(config, tokenizer, groups.grid.tp);
  options.faults = &faults;
  for (const bool held_out : {false, true}) {
    const int64_t count = held_out ? config.report.pictures - half : half;
    const auto chosen = samples_to_show(held_out ? data.held_out : data.training, count, options.format);
    const auto total = std::stoul(parallel::broadcast_text(fmt::to_string(chosen.size()), 0, groups.world));
    for (size_t i = 0; i < total; ++i) {
      PictureSample sample;
      if (groups.tp->getRank() == 0) sample = chosen[i].samples->sample(chosen[i].index, options.format);
      sample = broadcast_sample(sample, groups.tp);
      const auto answer = std::ranges::find(sample.loss_mask, 1) - sample.loss_mask.begin();
      const auto answer_end = std::find(sample.loss_mask.begin() + answer, sample.loss_mask.end(), 0);
      const std::vector<int64_t> truth(sample.tokens.begin() + answer,
                                       sample.tokens.begin() + (answer_end - sample.loss_mask.begin()));
      sample.tokens.resize(static_cast<size_t>(answer));
      const auto ids = caption_ids(model, sample.tokens, sample.pictures, options, groups.tp, device);
      if (groups.world->getRank() == 0) {
        shown.push_back({chosen[i].samples->name(chosen[i].index), held_out, tokenizer.decode(truth),
                         tokenizer.decode(ids), thumbnail_of(sample.pictures.front(), options.format.crops)});
      }
    }
  }
  faults.share(groups.world);
  return shown;
}

}  // namespace megatron_cpp::step37
