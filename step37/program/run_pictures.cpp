#include "step37/program/run_pictures.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <sstream>
#include <system_error>
#include <thread>
#include <utility>

#include "parallel/agree.h"
#include "parallel/runtime.h"
#include "step37/data/captioned_pictures.h"
#include "step37/data/picture.h"
#include "step37/data/utf8.h"
#include "step37/program/training_run.h"
#include "step37/published_checkpoint.h"

namespace megatron_cpp::step37 {
namespace {

/// The bytes of the index file; empty if there is none.
std::string read_index(const std::filesystem::path& path) {
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

CaptionLoader::Source source_of(std::vector<CaptionedPicture> pictures, std::vector<std::string>& captions) {
  CaptionLoader::Source source;
  source.pictures.reserve(pictures.size());
  captions.reserve(pictures.size());
  for (auto& picture : pictures) {
    source.pictures.push_back(
        {std::move(picture.path), picture.width, picture.height, picture.bytes, picture.modified});
    captions.push_back(std::move(picture.caption));
  }
  return source;
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
    TORCH_CHECK_VALUE(!error && fmt::to_string(size) == bytes, "data.directory ", printable(folder.string()),
                      " isn't the same on all hosts: ", printable(path), " has ", bytes, " bytes on rank 0's, here ",
                      error ? fmt::format("it can't be read: {}", error.message()) : fmt::to_string(size));
  }
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

RunPictures find_pictures(const parallel::Runtime& runtime, const parallel::ProcessGroups& groups,
                          const RunConfig& config, const std::filesystem::path& index_file) {
  const std::filesystem::path folder = config.data.directory;
  const bool is_main = runtime.rank() == 0;
  const bool packs = groups.tp->getRank() == 0;
  RunPictures result;
  CaptionedPictures found;
  std::string index;
  std::string samples;
  parallel::agree_on(
      [&] {
        const WaitForAll wait(runtime);
        if (!is_main) return;
        const auto on_disk = config.run.fresh ? "" : read_index(index_file);
        auto searched = search(folder, index_from_bytes(on_disk).value_or(PictureIndex{}));
        index = to_bytes(searched);
        found = pictures_of(std::move(searched), folder);
        result.max_unreadable = check_found(found, config.data.max_unreadable);
        samples = samples_of(found.pictures);
        if (index != on_disk) result.index = index;
      },
      groups.world);
  // All replicas pack from the list of rank 0, even if a folder on another host has more pictures.
  if (packs && groups.dp->getSize() > 1) {
    index = parallel::broadcast_text(index, 0, groups.dp);
    if (!is_main) found = pictures_of(index_from_bytes(index).value(), folder);
  }
  samples = parallel::broadcast_text(samples, 0, groups.world);
  result.max_unreadable = std::stoll(parallel::broadcast_text(fmt::to_string(result.max_unreadable), 0, groups.world));
  parallel::agree_on(
      [&] {
        check_samples(folder, samples);
        if (!packs) return;
        const auto total = found.pictures.size();
        result.num_without_caption = found.left_out.without_caption_file.count + found.left_out.empty_captions.count;
        auto split = split_held_out(std::move(found.pictures), config.data.held_out);
        result.training = source_of(std::move(split.training), result.training_captions);
        result.held_out = source_of(std::move(split.held_out), result.held_out_captions);
        TORCH_CHECK_VALUE(!result.training.pictures.empty(), printable(folder.string()), ": all ", total,
                          " captioned pictures are held out (data.held_out ", config.data.held_out, ")");
      },
      groups.world);
  return result;
}

Tokenizer train_tokenizer(const std::vector<std::string>& captions, int64_t vocabulary_size) {
  auto tokenizer = Tokenizer::train(captions, vocabulary_size);
  const auto needed = Tokenizer::needed(captions);
  if (needed.vocab_size > vocabulary_size) {
    const auto text = fmt::format(
        "warning: data.vocabulary_size {} is too small: the captions have {} different characters, so at least {}; "
        "until then the rarest are spelled in bytes\n",
        vocabulary_size, needed.num_characters, needed.vocab_size);
    std::fputs(text.c_str(), stderr);
  }
  return tokenizer;
}

Tokenizer first_tokenizer(const RunConfig& config, const std::vector<std::string>& captions) {
  const std::filesystem::path from = config.model.from;
  if (from.empty()) return train_tokenizer(captions, config.data.vocabulary_size);
  const int64_t V = config.published->text.vocabulary_size;
  if (!PublishedCheckpoint::is_at(from)) {
    return train_tokenizer(captions, std::min(config.data.vocabulary_size, V));
  }
  const auto file = RunFiles{from}.tokenizer();
  TORCH_CHECK_VALUE(std::filesystem::exists(file), from.string(), " has no ", file.filename().string(),
                    ": without the tokenizer of its weights captions can't be turned into their ids");
  auto tokenizer = Tokenizer::load(file);
  TORCH_CHECK_VALUE(tokenizer.vocab_size() <= V, file.string(), " has ", tokenizer.vocab_size(),
                    " pieces, the model a vocabulary of ", V);
  return tokenizer;
}

int64_t num_too_long(const CaptionLoader::Source& source, const CaptionLoader::Options& options) {
  int64_t count = 0;
  for (size_t i = 0; i < source.pictures.size(); ++i) {
    const auto sample = caption_sample(source.pictures[i], source.captions[i], options.format);
    if (static_cast<int64_t>(sample.tokens.size()) - 1 > options.packing.max_length) ++count;
  }
  return count;
}

std::string thumbnail_of(const std::filesystem::path& file, const CropOptions& crops) {
  constexpr int64_t kMaxSide = 224;
  const auto decoded = decode_picture(file);
  if (!decoded.ok()) return {};
  const auto plan = plan_crops(decoded.pixels.size(2), decoded.pixels.size(1), crops);
  return thumbnail(cut_views(decoded.pixels, plan, crops).global[0], kMaxSide);
}

}  // namespace megatron_cpp::step37
