#include "step37/program/run_data.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <system_error>
#include <thread>
#include <utility>

#include "parallel/agree.h"
#include "parallel/runtime.h"
#include "step37/data/caption_data_set.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/data_set_part.h"
#include "step37/data/picture.h"
#include "step37/data/utf8.h"
#include "step37/program/open_data_set.h"
#include "step37/program/training_run.h"
#include "step37/published_checkpoint.h"

namespace megatron_cpp::step37 {
namespace {

/// The bytes of a file; empty if there is none.
std::string read_if_there(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// On rank 0. Prints progress, as a folder of millions takes minutes.
PictureIndex search(const std::filesystem::path& folder, PictureIndex earlier) {
  using Clock = std::chrono::steady_clock;
  auto told = Clock::now();
  return scan_folder(folder, std::move(earlier), [&](int64_t count) {
    if (Clock::now() - told < std::chrono::seconds(5)) return;
    told = Clock::now();
    const auto text = fmt::format("looking at the pictures in {}: {} so far\n", printable(folder.string()), count);
    std::fputs(text.c_str(), stdout);
    std::fflush(stdout);
  });
}

/// Prints what was left out. Returns how many more pictures may turn out to be unreadable.
/// @throws c10::ValueError if too many are unreadable already.
int64_t check_found(const CaptionedPictures& found, double max_unreadable) {
  const auto unreadable = found.left_out.unreadable_pictures.count;
  const auto total = unreadable + static_cast<int64_t>(found.pictures.size());
  const auto allowed = static_cast<int64_t>(max_unreadable * static_cast<double>(total));
  const auto left_out = sentences(found);
  TORCH_CHECK_VALUE(unreadable <= allowed, left_out.front(), ", which is more than data.max_unreadable ",
                    max_unreadable, " allows");
  for (const auto& sentence : left_out) std::fputs(fmt::format("warning: left out: {}\n", sentence).c_str(), stderr);
  return std::min(allowed, total - 1) - unreadable;  // all of them never may
}

/// Names and file sizes of a few pictures, as text with a NUL after each, to compare the folders of different hosts.
std::string samples_of(const std::vector<CaptionedPicture>& pictures) {
  constexpr size_t kSamples = 64;
  std::string text;
  const size_t taken = std::min(kSamples, pictures.size());
  for (size_t i = 0; i < taken; ++i) {
    const auto& picture = pictures[i * pictures.size() / taken];
    text += fmt::format("{}{}{}{}", picture.path, '\0', picture.bytes, '\0');
  }
  return text;
}

/// @throws c10::ValueError naming the first of `samples` that differs from the host of rank 0.
void check_samples(const std::filesystem::path& folder, const std::string& samples) {
  std::istringstream parts(samples);
  std::string path;
  std::string bytes;
  while (std::getline(parts, path, '\0') && std::getline(parts, bytes, '\0')) {
    std::error_code error;
    const auto size = std::filesystem::file_size(folder / path, error);
    TORCH_CHECK_VALUE(!error && fmt::to_string(size) == bytes, printable(folder.string()),
                      " isn't the same on all hosts: ", printable(path), " has ", bytes, " bytes on rank 0's, here ",
                      error ? fmt::format("it can't be read: {}", error.message()) : fmt::to_string(size));
  }
}

/// Gives the pictures the numbers that an earlier start of the run gave them, so that its samplers go on when pictures
/// were added or removed: those of `order`, their paths with a NUL after each, in its order, then the others. A removed
/// one keeps its place, without a caption.
void keep_order(const std::string& order, std::vector<CaptionedPicture>& pictures) {
  if (order.empty()) return;
  std::map<std::string, CaptionedPicture> left;
  for (auto& picture : pictures) left.emplace(picture.path, std::move(picture));
  pictures.clear();
  std::istringstream paths(order);
  for (std::string path; std::getline(paths, path, '\0');) {
    auto found = left.extract(path);
    pictures.push_back(found.empty() ? CaptionedPicture{.path = path, .caption = {}} : std::move(found.mapped()));
  }
  for (auto& [path, picture] : left) pictures.push_back(std::move(picture));
}

std::string order_of(const std::vector<CaptionedPicture>& pictures) {
  std::string order;
  for (const auto& picture : pictures) order += picture.path + '\0';
  return order;
}

/// The data sets of the configuration, by name.
DataSetSections data_sets_of(const DataSection& data) {
  if (data.directory.empty()) return data.sets;
  return {{kDirectoryDataSet, {.kind = DataSetKind::kCaptions, .path = data.directory}}};
}

/// The folder of a data set's pictures.
std::filesystem::path picture_folder(const DataSetSection& section) {
  const std::filesystem::path path = section.path;
  std::error_code unknown;
  const bool is_folder = section.kind == DataSetKind::kCaptions || section.kind == DataSetKind::kFlickr8k ||
                         std::filesystem::is_directory(path, unknown);
  if (!section.pictures.empty()) return section.pictures;
  return is_folder ? path : path.parent_path();
}

/// Adds the two parts of a data set to `data`.
void add(const std::string& name, const DataSetSection& section, const DataSetSplit& split, RunData& data) {
  const auto draws = section.shuffle ? SampleOrder::kShuffled : SampleOrder::kSequential;
  data.training.push_back({name, split.training, section.weight, draws});
  if (split.held_out->num_samples() > 0) data.held_out.push_back({name, split.held_out, section.weight, draws});
}

void open_captions(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups, const RunConfig& config,
                   const std::string& name, const DataSetSection& section, RunData& data) {
  const std::filesystem::path folder = section.path;
  const RunFiles files{config.run.directory};
  const auto index_file = files.picture_index(name);
  const auto order_file = files.picture_order(name);
  const bool is_main = runtime.rank() == 0;
  const bool packs = groups.tp->getRank() == 0;
  CaptionedPictures found;
  std::string index;
  std::string order;
  std::string samples;
  int64_t max_unreadable = 0;
  parallel::agree_on(
      [&] {
        const WaitForAll wait(runtime);
        if (!is_main) return;
        const auto on_disk = config.run.fresh ? "" : read_if_there(index_file);
        auto searched = search(folder, index_from_bytes(on_disk).value_or(PictureIndex{}));
        index = to_bytes(searched);
        found = pictures_of(std::move(searched), folder);
        max_unreadable = check_found(found, config.data.max_unreadable);
        samples = samples_of(found.pictures);
        if (index != on_disk) data.indices.emplace_back(index_file, index);
        const auto order_on_disk = config.run.fresh ? "" : read_if_there(order_file);
        keep_order(order_on_disk, found.pictures);
        order = order_of(found.pictures);
        if (order != order_on_disk) data.indices.emplace_back(order_file, order);
      },
      groups.world);
  // All replicas pack from the list of rank 0, even if a folder on another host has more pictures.
  if (packs && groups.dp->getSize() > 1) {
    index = parallel::broadcast_text(index, 0, groups.dp);
    order = parallel::broadcast_text(order, 0, groups.dp);
    if (!is_main) {
      found = pictures_of(index_from_bytes(index).value(), folder);
      keep_order(order, found.pictures);
    }
  }
  samples = parallel::broadcast_text(samples, 0, groups.world);
  data.max_unreadable += std::stoll(parallel::broadcast_text(fmt::to_string(max_unreadable), 0, groups.world));
  parallel::agree_on(
      [&] {
        check_samples(folder, samples);
        if (!packs) return;
        const auto total = found.pictures.size();
        const auto without_caption = found.left_out.without_caption_file.count + found.left_out.empty_captions.count;
        auto split = split_held_out(std::move(found.pictures), config.data.held_out);
        const auto count = [](const std::vector<CaptionedPicture>& pictures) {
          return std::ranges::count_if(pictures, [](const auto& picture) { return !picture.caption.empty(); });
        };
        TORCH_CHECK_VALUE(count(split.training) > 0, printable(folder.string()), ": all ", total,
                          " captioned pictures are held out (data.held_out ", config.data.held_out, ")");
        data.summary.push_back(fmt::format("{} pictures to train on, {} held out, {} without a caption in {}",
                                           count(split.training), count(split.held_out), without_caption,
                                           printable(folder.string())));
        add(name, section,
            {std::make_shared<const CaptionDataSet>(folder, std::move(split.training)),
             std::make_shared<const CaptionDataSet>(folder, std::move(split.held_out))},
            data);
      },
      groups.world);
}

/// Opens a data set of another kind on every rank that packs.
void open_other(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups, const RunConfig& config,
                const std::string& name, const DataSetSection& section, RunData& data) {
  const bool is_main = runtime.rank() == 0;
  const bool packs = groups.tp->getRank() == 0;
  std::shared_ptr<const DataSet> samples;
  std::string size;
  parallel::agree_on(
      [&] {
        const WaitForAll wait(runtime);
        if (!packs) return;
        std::optional<Tokenizer> tokenizer;
        SampleFormat format;
        format.crops = crop_options(config);
        if (holds_token_ids(section.kind)) {
          const auto file = given_tokenizer(config);
          TORCH_CHECK_VALUE(file, "the data set ", name, " holds token ids: data.tokenizer must name their tokenizer");
          tokenizer = Tokenizer::load(*file);
          format = sample_format(*tokenizer, format.crops);
        }
        samples = open_data_set(section, format, config.training.sequence_length);
        size = fmt::to_string(samples->num_samples());
      },
      groups.world);
  const auto size_on_main = parallel::broadcast_text(size, 0, groups.world);
  const auto count = std::stoll(size_on_main);
  // How many pictures it has isn't known before they are read.
  data.max_unreadable += static_cast<int64_t>(config.data.max_unreadable * static_cast<double>(count));
  parallel::agree_on(
      [&] {
        if (!packs) return;
        TORCH_CHECK_VALUE(size == size_on_main, "the data set ", name, ", ", printable(section.path),
                          ", isn't the same on all hosts: ", size_on_main, " samples on rank 0's, here ", size);
        if (is_main) {
          for (const auto& sentence : samples->left_out()) {
            std::fputs(fmt::format("warning: {}: {}\n", printable(section.path), sentence).c_str(), stderr);
          }
        }
        const auto split = split_held_out(samples, config.data.held_out);
        const auto held_out = split.held_out->num_samples();
        TORCH_CHECK_VALUE(held_out < count, printable(section.path), ": all ", count,
                          " samples are held out (data.held_out ", config.data.held_out, ")");
        data.summary.push_back(fmt::format("{} samples to train on, {} held out in {}", count - held_out, held_out,
                                           printable(section.path)));
        add(name, section, split, data);
      },
      groups.world);
}

}  // namespace

WaitForAll::~WaitForAll() {
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Ibarrier(runtime_.world().get(), &request);
  for (int done = 0;;) {
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done != 0) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

RunData open_data(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups, const RunConfig& config) {
  RunData data;
  for (const auto& [name, section] : data_sets_of(config.data)) {
    const auto open = section.kind == DataSetKind::kCaptions ? open_captions : open_other;
    open(runtime, groups, config, name, section, data);
  }
  return data;
}

PictureNames picture_names(const RunConfig& config) {
  std::map<std::string, std::filesystem::path> folders;
  for (const auto& [name, section] : data_sets_of(config.data)) folders[name] = picture_folder(section);
  return PictureNames(std::move(folders));
}

FeatureSource feature_source(const RunConfig& config) {
  return {config.vision, crop_options(config), config.training.precision};
}

std::vector<SampleReference> spread_samples(const std::vector<WeightedDataSet>& sets, int64_t count) {
  int64_t total = 0;
  for (const auto& data_set : sets) total += data_set.samples->num_samples();
  const int64_t taken = std::min(total, count);
  std::vector<SampleReference> chosen;
  auto data_set = sets.begin();
  int64_t before = 0;  // samples of the data sets before this one
  for (int64_t i = 0; i < taken; ++i) {
    const int64_t number = i * total / taken;
    for (; number - before >= data_set->samples->num_samples(); ++data_set) before += data_set->samples->num_samples();
    chosen.push_back({data_set->samples.get(), number - before});
  }
  return chosen;
}

std::vector<std::string> training_texts(const RunData& data) {
  std::vector<std::string> texts;
  for (const auto& [samples, index] : spread_samples(data.training, 1'000'000)) {
    std::ranges::move(samples->texts(index), std::back_inserter(texts));
  }
  return texts;
}

Tokenizer train_tokenizer(const std::vector<std::string>& texts, int64_t vocabulary_size,
                          const std::vector<std::string>& symbols) {
  auto tokenizer = Tokenizer::train(texts, vocabulary_size, symbols);
  const auto needed = Tokenizer::needed(texts, symbols);
  if (needed.vocab_size > vocabulary_size) {
    const auto text = fmt::format(
        "warning: data.vocabulary_size {} is too small: the texts have {} different characters, so at least {}; until "
        "then the rarest are spelled in bytes\n",
        vocabulary_size, needed.num_characters, needed.vocab_size);
    std::fputs(text.c_str(), stderr);
  }
  return tokenizer;
}

std::optional<std::filesystem::path> given_tokenizer(const RunConfig& config) {
  if (!config.data.tokenizer.empty()) return config.data.tokenizer;
  const std::filesystem::path from = config.model.from;
  if (from.empty() || !PublishedCheckpoint::is_at(from)) return std::nullopt;
  auto file = RunFiles{from}.tokenizer();
  TORCH_CHECK_VALUE(std::filesystem::exists(file), from.string(), " has no ", file.filename().string(),
                    ": without the tokenizer of its weights texts can't be turned into their ids; data.tokenizer may "
                    "name one");
  return file;
}

Tokenizer first_tokenizer(const RunConfig& config, const RunData& data) {
  auto size = config.data.vocabulary_size;
  if (config.published) size = std::min(size, config.published->text.vocabulary_size);
  const auto file = given_tokenizer(config);
  if (!file) return train_tokenizer(training_texts(data), size, chat_symbols(config.data.sets));
  auto tokenizer = Tokenizer::load(*file);
  TORCH_CHECK_VALUE(!config.published || tokenizer.vocab_size() <= config.published->text.vocabulary_size,
                    file->string(), " has ", tokenizer.vocab_size(), " pieces, the model a vocabulary of ",
                    config.published->text.vocabulary_size);
  sample_format(tokenizer, crop_options(config));
  check_chat_symbols(config.data.sets, tokenizer);
  return tokenizer;
}

int64_t num_too_long(const std::vector<SampleReference>& samples, const BatchLoaderOptions& options) {
  return std::ranges::count_if(samples, [&](const SampleReference& chosen) {
    const auto num_tokens = static_cast<int64_t>(chosen.samples->sample(chosen.index, options.format).tokens.size());
    return num_tokens - 1 > options.packing.max_length;
  });
}

std::string thumbnail_of(const PictureReference& picture, const CropOptions& crops) {
  constexpr int64_t kMaxSide = 224;
  const auto decoded = decode_picture(picture.path, picture.place);
  if (!decoded.ok()) return {};
  const auto plan = plan_crops(decoded.pixels.size(2), decoded.pixels.size(1), crops);
  return thumbnail(cut_views(decoded.pixels, plan, crops).global[0], kMaxSide);
}

}  // namespace megatron_cpp::step37
