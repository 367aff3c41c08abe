// A part of a data set, as a data set.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "step37/data/data_set.h"

namespace megatron_cpp::step37 {

/// Some samples of a data set, in its order. Keeps 8 bytes a sample.
class DataSetPart final : public DataSet {
 public:
  /// @param indices  of the samples in `whole`
  DataSetPart(std::shared_ptr<const DataSet> whole, std::vector<int64_t> indices);

  int64_t num_samples() const override { return static_cast<int64_t>(indices_.size()); }
  std::string name(int64_t index) const override { return whole_->name(index_in_whole(index)); }
  std::vector<std::string> texts(int64_t index) const override { return whole_->texts(index_in_whole(index)); }
  std::vector<PictureReference> pictures(int64_t index, const SampleFormat& format) const override {
    return whole_->pictures(index_in_whole(index), format);
  }
  PictureSample sample(int64_t index, const SampleFormat& format) const override {
    return whole_->sample(index_in_whole(index), format);
  }

 private:
  int64_t index_in_whole(int64_t index) const { return indices_.at(static_cast<size_t>(index)); }

  std::shared_ptr<const DataSet> whole_;
  std::vector<int64_t> indices_;
};

/// A data set's samples to train on, and the others.
struct DataSetSplit {
  std::shared_ptr<const DataSet> training;
  std::shared_ptr<const DataSet> held_out;
};

/// Splits by is_held_out of each sample's number, as text: samples that are added at the end change nothing, nor does
/// another place of the files, and a larger fraction holds out a superset.
/// @throws c10::ValueError if `fraction` isn't in [0, 1].
DataSetSplit split_held_out(const std::shared_ptr<const DataSet>& whole, double fraction);

}  // namespace megatron_cpp::step37
