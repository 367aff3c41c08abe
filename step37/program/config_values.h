// Values of configuration keys as text, and back.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "step37/program/run_config.h"

namespace megatron_cpp::step37 {

/// The names of an enumeration's values. A value may have several; the first of each is written.
template <class Value>
using Names = std::vector<std::pair<std::string, Value>>;

// Only the type of the argument matters.
Names<EmbeddingSharding> names_of(EmbeddingSharding type);
Names<ProjectorSharding> names_of(ProjectorSharding type);
Names<InsertExchange> names_of(InsertExchange type);
Names<MmEncoderTpMode> names_of(MmEncoderTpMode type);
Names<LearningRateDecay> names_of(LearningRateDecay type);
Names<OversizePolicy> names_of(OversizePolicy type);
Names<DataSetKind> names_of(DataSetKind type);
Names<TrainedTurns> names_of(TrainedTurns type);
Names<NotFiniteAction> names_of(NotFiniteAction type);
Names<WriteErrorAction> names_of(WriteErrorAction type);
Names<at::ScalarType> names_of(at::ScalarType type);
/// All spellings of YAML 1.2's core schema.
Names<bool> names_of(bool type);

/// The text that read_value reads as `value`.
template <class Named>
std::string write_value(Named value) {
  const auto names = names_of(value);
  return std::find_if(names.begin(), names.end(), [&](const auto& entry) { return entry.second == value; })->first;
}
std::string write_value(const std::string& value);
std::string write_value(int64_t value);
/// The shortest digits that read back as the same number.
std::string write_value(double value);
std::string write_value(const std::optional<int64_t>& value);
std::string write_value(const LossChunk& value);
std::string write_value(const ParameterScales& value);
std::string write_value(const Recompute& value);
std::string write_value(const StepRange& value);
std::string write_value(const DataSetSections& value);

/// Reads `text` into `value`. Returns an empty text, or, if `text` is wrong, what it has to be: "an integer".
template <class Named>
std::string read_value(const std::string& text, Named& value) {
  std::string names;
  for (const auto& [name, named] : names_of(value)) {
    if (text == name) return value = named, "";
    names.append(names.empty() ? "one of " : ", ").append(name);
  }
  return names;
}
std::string read_value(const std::string& text, std::string& value);
std::string read_value(const std::string& text, int64_t& value);
std::string read_value(const std::string& text, double& value);
std::string read_value(const std::string& text, std::optional<int64_t>& value);
std::string read_value(const std::string& text, LossChunk& value);
std::string read_value(const std::string& text, ParameterScales& value);
std::string read_value(const std::string& text, Recompute& value);
std::string read_value(const std::string& text, StepRange& value);
std::string read_value(const std::string& text, DataSetSections& value);

}  // namespace megatron_cpp::step37
