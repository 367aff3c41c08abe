// Data sets of any format: samples of token ids and pictures, by index.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "megatron_cpp/data/packed_batch.h"
#include "step37/data/crop_plan.h"
#include "step37/data/picture.h"
#include "step37/data/tokenizer.h"

namespace megatron_cpp::step37 {

/// Refers to a picture, with what is needed to compute its tokens without opening it.
struct PictureReference {
  std::string path;         ///< of the picture, or of an archive that has it
  int64_t width = 0;        ///< pixels, upright
  int64_t height = 0;       ///< pixels, upright
  int64_t bytes = 0;        ///< of the file when it was found; 0 if changes aren't looked for
  int64_t modified = 0;     ///< as CaptionedPicture::modified; 0 if changes aren't looked for
  PicturePlace place = {};  ///< in the file
};

/// As a list, to send it. Paths may have any bytes, so CBOR, not text.
void to_json(nlohmann::json& json, const PictureReference& picture);
void from_json(const nlohmann::json& json, PictureReference& picture);

/// A sample and its pictures, in the order of their tokens.
struct PictureSample : Sample {
  std::vector<PictureReference> pictures;
};

class PictureFeatures;

/// How text and pictures become token ids.
struct SampleFormat {
  const Tokenizer* tokenizer = nullptr;  ///< outlives the format; null where no text is encoded
  CropOptions crops;
  PictureTokenIds picture_ids{};
  std::optional<int64_t> begin_id;  ///< nullopt: a sample begins without one
  int64_t end_id = 0;
  /// Takes the place of the pictures, which aren't opened then; outlives the format. Null: pictures are decoded.
  const PictureFeatures* features = nullptr;
};

/// The format of samples for `tokenizer`, which outlives it: its begin, end and picture ids.
/// @throws c10::ValueError naming a picture symbol that the tokenizer lacks.
SampleFormat sample_format(const Tokenizer& tokenizer, const CropOptions& crops);

/// The begin token and the tokens of the pictures, one behind the other.
std::vector<int64_t> prompt_tokens(const std::vector<PictureReference>& pictures, const SampleFormat& format);

/// Refers to a picture by width and height of its header; by a square of CropOptions::global_side if it can't be read
/// (decoding will then give a black picture of that size, with a warning). The features of a format know the sizes of
/// their pictures, so that no header is read.
PictureReference reference_to(const std::filesystem::path& file, const SampleFormat& format,
                              const PicturePlace& place = {});

/// Samples that can be read in any order. Reading a sample doesn't change the data set, so that several threads may do
/// it. Not collective: each rank that needs one opens it by itself.
class DataSet {
 public:
  virtual ~DataSet() = default;

  virtual int64_t num_samples() const = 0;

  /// What messages call a sample: "chats.jsonl line 12". It doesn't change when samples are added to the data set.
  /// @param index  in [0, num_samples()), as in all functions
  virtual std::string name(int64_t index) const = 0;

  /// The texts that a tokenizer is to be trained on; none in a data set of token ids.
  virtual std::vector<std::string> texts(int64_t index) const = 0;

  /// The pictures of a sample, as sample() gives them; needs no tokenizer. One that sample() refuses may have some.
  /// @throws c10::ValueError as sample() for a file that was changed or can't be read any more.
  virtual std::vector<PictureReference> pictures(int64_t index, const SampleFormat& format) const = 0;

  /// One sample; with no tokens if there is nothing to train on, so that it is passed over.
  /// A broken picture is no error here: its reference gets the size of CropOptions::global_side.
  /// @throws c10::ValueError naming the sample if its file was changed or can't be read any more, or has an id that
  ///         isn't in the tokenizer's vocabulary.
  virtual PictureSample sample(int64_t index, const SampleFormat& format) const = 0;

  /// What was left out when the data set was opened, as sentences: "2 of 40 lines are left out (first: ...)".
  virtual std::vector<std::string> left_out() const { return {}; }
};

}  // namespace megatron_cpp::step37
