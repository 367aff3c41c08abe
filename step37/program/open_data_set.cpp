#include "step37/program/open_data_set.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "step37/data/conversation_data_set.h"
#include "step37/data/document_data_set.h"
#include "step37/data/flickr8k_data_set.h"
#include "step37/data/token_data_set.h"
#include "step37/data/utf8.h"
#include "step37/data/web_data_set.h"

namespace megatron_cpp::step37 {
namespace {

/// Calls action(template) for each data set that has one, and puts the data set's name before the text of its errors,
/// and `hint` behind.
template <class Action>
void for_each_template(const DataSetSections& sets, const char* hint, const Action& action) {
  for (const auto& [name, section] : sets) {
    try {
      if (const auto chat_template = chat_template_of(section)) action(*chat_template);
    } catch (const c10::ValueError& error) {
      TORCH_CHECK_VALUE(false, "the data set ", name, ": ", error.what_without_backtrace(), hint);
    }
  }
}

}  // namespace

bool holds_token_ids(DataSetKind kind) { return kind == DataSetKind::kTokens || kind == DataSetKind::kIndexed; }

std::optional<ChatTemplate> chat_template_of(const DataSetSection& section) {
  if (section.kind == DataSetKind::kCaptions || holds_token_ids(section.kind)) return std::nullopt;
  const auto& name = section.chat_template;
  return name.ends_with(".json") ? ChatTemplate::load(name) : ChatTemplate::named(name);
}

std::vector<std::string> chat_symbols(const DataSetSections& sets) {
  std::vector<std::string> symbols;
  for_each_template(sets, "", [&](const ChatTemplate& chat_template) {
    for (const auto& symbol : chat_template.symbols()) {
      if (symbol != kEndSymbol && std::ranges::find(symbols, symbol) == symbols.end()) symbols.push_back(symbol);
    }
  });
  return symbols;
}

void check_chat_symbols(const DataSetSections& sets, const Tokenizer& tokenizer) {
  for_each_template(sets, "; its chat_template needs it",
                    [&](const ChatTemplate& chat_template) { chat_template.check(tokenizer); });
}

std::shared_ptr<const DataSet> open_data_set(const DataSetSection& section, const SampleFormat& format,
                                             int64_t max_length) {
  const auto conversations = [&] {
    return ConversationOptions{chat_template_of(section).value(), section.turns, section.pictures};
  };
  switch (section.kind) {
    case DataSetKind::kCaptions:
      break;
    case DataSetKind::kConversations:
      return std::make_shared<ConversationDataSet>(section.path, conversations());
    case DataSetKind::kTokens:
      return std::make_shared<TokenDataSet>(section.path, TokenOptions{.vocab_size = format.tokenizer->vocab_size(),
                                                                       .picture_ids = format.picture_ids,
                                                                       .crops = format.crops,
                                                                       .picture_folder = section.pictures});
    case DataSetKind::kWebDataset:
      return std::make_shared<WebDataSet>(section.path, conversations());
    case DataSetKind::kIndexed:
      return std::make_shared<DocumentDataSet>(section.path, max_length + 1);
    case DataSetKind::kFlickr8k:
      return std::make_shared<Flickr8kDataSet>(section.path, conversations(), section.caption,
                                               section.prompt.empty() ? Flickr8kDataSet::kPrompt : section.prompt);
  }
  TORCH_CHECK_VALUE(false, printable(section.path), ": folders of captioned pictures are opened by open_data");
}

}  // namespace megatron_cpp::step37
