// Opens one data set of data.sets.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "step37/data/chat_template.h"
#include "step37/data/data_set.h"
#include "step37/program/data_sets.h"

namespace megatron_cpp::step37 {

/// Whether a data set of this kind holds token ids, so that its tokenizer must be given.
bool holds_token_ids(DataSetKind kind);

/// The chat template of a data set; nullopt if its kind has none.
/// @throws c10::ValueError as ChatTemplate::load.
std::optional<ChatTemplate> chat_template_of(const DataSetSection& section);

/// The control symbols of the data sets' chat templates, each once: for Tokenizer::train.
/// @throws c10::ValueError as chat_template_of, naming the data set.
std::vector<std::string> chat_symbols(const DataSetSections& sets);

/// @throws c10::ValueError naming the data set, the symbol and the tokenizer, as ChatTemplate::check.
void check_chat_symbols(const DataSetSections& sets, const Tokenizer& tokenizer);

/// Opens a data set of any kind but captions. Not collective.
/// @param format       of its samples; its tokenizer may be null unless holds_token_ids
/// @param max_length   positions of a sequence
/// @throws c10::ValueError naming what is at fault, as the constructor of its class.
std::shared_ptr<const DataSet> open_data_set(const DataSetSection& section, const SampleFormat& format,
                                             int64_t max_length);

}  // namespace megatron_cpp::step37
