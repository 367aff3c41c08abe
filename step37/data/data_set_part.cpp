#include "step37/data/data_set_part.h"

#include <fmt/format.h>

#include "step37/data/captioned_pictures.h"

namespace megatron_cpp::step37 {

DataSetPart::DataSetPart(std::shared_ptr<const DataSet> whole, std::vector<int64_t> indices)
    : whole_(std::move(whole)), indices_(std::move(indices)) {}

DataSetSplit split_held_out(const std::shared_ptr<const DataSet>& whole, double fraction) {
  std::vector<int64_t> training;
  std::vector<int64_t> held_out;
  for (int64_t i = 0; i < whole->num_samples(); ++i) {
    (is_held_out(fmt::to_string(i), fraction) ? held_out : training).push_back(i);
  }
  return {std::make_shared<DataSetPart>(whole, std::move(training)),
          std::make_shared<DataSetPart>(whole, std::move(held_out))};
}

}  // namespace megatron_cpp::step37
