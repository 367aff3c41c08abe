#include "step37/data/chat_template.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "megatron_cpp/checkpoint/json_object.h"

namespace megatron_cpp::step37 {
namespace {

using Role = ChatMessage::Role;
using Kind = ChatPart::Kind;
using Messages = std::vector<ChatMessage>;

constexpr std::array<std::string_view, 4> kRoleNames = {"system", "user", "assistant", "tool"};

std::string_view name_of(Role role) { return kRoleNames[static_cast<size_t>(role)]; }

/// Puts parts together.
class Parts {
 public:
  explicit Parts(const std::vector<std::string>& symbols) : symbols_(symbols) {}

  /// Of what follows.
  void set_in_loss(bool in_loss) { in_loss_ = in_loss; }

  /// Text of a template, with symbols.
  void literal(std::string_view text) {
    while (!text.empty()) {
      auto begin = text.size();
      std::string_view first;
      const auto look_for = [&](std::string_view symbol) {
        const auto found = text.find(symbol);
        // The longer of two that begin at the same place.
        if (found > begin || (found == begin && symbol.size() <= first.size()) || found == text.npos) return;
        begin = found;
        first = symbol;
      };
      for (const auto& symbol : symbols_) look_for(symbol);
      look_for(kEndSymbol);
      plain(text.substr(0, begin));
      if (!first.empty()) parts_.push_back({Kind::kSymbol, std::string(first), in_loss_});
      text.remove_prefix(begin + first.size());
    }
  }

  /// Text in which nothing has a meaning.
  void plain(std::string_view text) {
    if (text.empty()) return;
    if (!parts_.empty() && parts_.back().kind == Kind::kText && parts_.back().in_loss == in_loss_) {
      parts_.back().text += text;
    } else {
      parts_.push_back({Kind::kText, std::string(text), in_loss_});
    }
  }

  /// Text of a message, with pictures.
  void content(std::string_view text) {
    for (auto found = text.find(kPicturePlaceholder); found != text.npos; found = text.find(kPicturePlaceholder)) {
      plain(text.substr(0, found));
      parts_.push_back({Kind::kPicture, {}, in_loss_});
      text.remove_prefix(found + kPicturePlaceholder.size());
    }
    plain(text);
  }

  std::vector<ChatPart> take() { return std::move(parts_); }

 private:
  const std::vector<std::string>& symbols_;
  std::vector<ChatPart> parts_;
  bool in_loss_ = false;
};

/// Per message, whether its loss counts.
std::vector<bool> turns_in_loss(const Messages& messages, TrainedTurns trained) {
  TORCH_CHECK_VALUE(!messages.empty() && messages.back().role == Role::kAssistant,
                    "the last message isn't the assistant's");
  size_t begin = messages.size();
  while (begin > 0 && messages[begin - 1].role != Role::kUser) --begin;
  TORCH_CHECK_VALUE(begin > 0, "there is no message of the user");
  if (trained == TrainedTurns::kAll) begin = 0;
  std::vector<bool> result(messages.size(), false);
  for (auto i = begin; i < messages.size(); ++i) {
    result[i] = messages[i].role == Role::kAssistant && messages[i].in_loss;
  }
  TORCH_CHECK_VALUE(std::find(result.begin(), result.end(), true) != result.end(),
                    "no message of the assistant counts in the loss");
  return result;
}

/// The part of an assistant's turn that is a generation prompt, unless it stands behind another assistant's turn.
void generation_prompt(Parts& parts, std::string_view text, const Messages& messages, size_t i, bool in_loss) {
  parts.set_in_loss(in_loss && i > 0 && messages[i - 1].role == Role::kAssistant);
  parts.literal(text);
  parts.set_in_loss(in_loss);
}

void described_turns(Parts& parts, const Conversation& conversation, const std::vector<bool>& in_loss,
                     const std::vector<std::optional<ChatTemplate::Turn>>& roles) {
  TORCH_CHECK_VALUE(conversation.tools.empty() && !conversation.reasoning_effort,
                    "the chat template has no place for tools and reasoning effort");
  const auto& messages = conversation.messages;
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& message = messages[i];
    const auto& turn = roles[static_cast<size_t>(message.role)];
    TORCH_CHECK_VALUE(turn.has_value(), "message ", i + 1, ": the chat template has no turns of role ",
                      name_of(message.role));
    TORCH_CHECK_VALUE(!message.reasoning && message.tool_calls.empty() && !message.is_observation, "message ", i + 1,
                      ": the chat template has no place for reasoning, tool calls and observations");
    generation_prompt(parts, turn->begin, messages, i, in_loss[i]);
    parts.content(message.content);
    parts.literal(turn->end);
    parts.set_in_loss(false);
  }
}

// The template of the released model. In the order of its Jinja source, whose names are kept.

constexpr std::string_view kThinkBegin = "<think>";
constexpr std::string_view kThinkEnd = "</think>";

std::string_view without_leading_lines(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of('\n'), text.size()));
}

std::string_view without_trailing_lines(std::string_view text) {
  return text.substr(0, text.find_last_not_of('\n') + 1);  // npos + 1 is 0
}

/// Reasoning and answer of an assistant.
struct Answer {
  std::string_view reasoning;
  std::string_view content;
};

/// Reasoning that isn't given apart is what stands before the first </think>, behind the last <think> there.
Answer answer_of(const ChatMessage& message) {
  const std::string_view content = message.content;
  if (message.reasoning) return {*message.reasoning, content};
  const auto first_end = content.find(kThinkEnd);
  if (first_end == content.npos) return {{}, content};
  auto reasoning = without_trailing_lines(content.substr(0, first_end));
  if (const auto begin = reasoning.rfind(kThinkBegin); begin != reasoning.npos) {
    reasoning.remove_prefix(begin + kThinkBegin.size());
  }
  return {without_leading_lines(reasoning),
          without_leading_lines(content.substr(content.rfind(kThinkEnd) + kThinkEnd.size()))};
}

/// Behind this message assistants' reasoning is kept: the last user turn that isn't a tool's response in disguise.
size_t last_query_index(const Messages& messages) {
  for (size_t i = messages.size(); i > 0; --i) {
    const auto& [role, content, reasoning, calls, is_observation, in_loss] = messages[i - 1];
    if (role != Role::kUser) continue;
    if (!(content.starts_with("<tool_response>") && content.ends_with("</tool_response>"))) return i - 1;
  }
  // There the released template renders a part of a conversation otherwise than the whole.
  TORCH_CHECK_VALUE(false, "all messages of the user are tool responses");
}

constexpr std::string_view kBeforeTools =
    "# Tools\n\nYou have access to the following functions in JSONSchema format:\n\n<tools>";
constexpr std::string_view kCallFormat =
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
    "format: an inner <function=...>\n...\n</function> block must be nested within <tool_call>\n...\n</tool_call> XML "
    "tags\n- Required parameters MUST be specified\n</IMPORTANT>";

void step37_head(Parts& parts, const Conversation& conversation) {
  const auto& first = conversation.messages.front();
  const bool has_system = first.role == Role::kSystem;
  const bool has_tools = !conversation.tools.empty();
  if (!has_system && !has_tools && !conversation.reasoning_effort) return;
  parts.literal("<|im_start|>system\n");
  if (conversation.reasoning_effort) parts.plain("Reasoning: " + *conversation.reasoning_effort + "\n\n");
  if (has_system) parts.content(first.content);
  if (has_tools) {
    if (has_system) parts.plain("\n\n");
    parts.plain(kBeforeTools);
    for (const auto& tool : conversation.tools) parts.plain("\n" + tool);
    parts.literal(kCallFormat);
  }
  parts.literal("<|im_end|>\n");
}

void step37_tool_call(Parts& parts, const ToolCall& call) {
  parts.literal("<tool_call>");
  parts.plain("\n<function=" + call.name + ">\n");
  for (const auto& [name, value] : call.arguments)
    parts.plain(fmt::format("<parameter={}>\n{}\n</parameter>\n", name, value));
  parts.literal("</function>\n</tool_call>");
}

void step37_turns(Parts& parts, const Conversation& conversation, const std::vector<bool>& in_loss) {
  step37_head(parts, conversation);
  const auto& messages = conversation.messages;
  const auto last_query = last_query_index(messages);
  for (size_t i = 0; i < messages.size(); ++i) {
    const auto& message = messages[i];
    switch (message.role) {
      case Role::kSystem:
      case Role::kUser: {
        if (message.role == Role::kSystem && i == 0) break;
        parts.literal("<|im_start|>");
        parts.plain(message.is_observation ? "observation" : name_of(message.role));
        parts.plain("\n");
        parts.content(message.content);
        parts.literal("<|im_end|>\n");
        break;
      }
      case Role::kAssistant: {
        const auto [reasoning, content] = answer_of(message);
        if (i > last_query) {
          generation_prompt(parts, "<|im_start|>assistant\n<think>\n", messages, i, in_loss[i]);
          parts.content(reasoning);
          parts.literal("\n</think>\n");
        } else {
          generation_prompt(parts, "<|im_start|>assistant\n", messages, i, in_loss[i]);
        }
        parts.content(content);
        for (const auto& call : message.tool_calls) step37_tool_call(parts, call);
        parts.literal("<|im_end|>\n");
        parts.set_in_loss(false);
        break;
      }
      case Role::kTool: {
        if (i == 0 || messages[i - 1].role != Role::kTool) parts.literal("<|im_start|>tool_response\n");
        parts.literal("<tool_response>");
        parts.content(message.content);
        parts.literal("</tool_response>");
        if (messages[i + 1].role != Role::kTool) parts.literal("<|im_end|>\n");  // the last one is the assistant's
        break;
      }
    }
  }
}

}  // namespace

ChatTemplate ChatTemplate::named(std::string_view name) {
  if (name == "step37") {
    return {{"<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
             "</tool_response>"},
            {}};
  }
  if (name == "chatml") {
    const auto turn = [](const std::string& role) { return Turn{"<|im_start|>" + role + "\n", "<|im_end|>\n"}; };
    return {{"<|im_start|>", "<|im_end|>"}, {turn("system"), turn("user"), turn("assistant"), std::nullopt}};
  }
  TORCH_CHECK_VALUE(name == "plain", "there is no chat template ", name, "; there are step37, chatml, plain");
  return {{}, {Turn{"", "\n"}, Turn{"", "\n"}, Turn{"", std::string(kEndSymbol)}, std::nullopt}};
}

ChatTemplate ChatTemplate::load(const std::filesystem::path& file) {
  const auto json = megatron_cpp::internal::read_json_file(file);
  const megatron_cpp::internal::JsonObject description(json, file);
  std::vector<std::string> symbols;
  if (description.has("symbols")) symbols = description.texts("symbols");
  for (const auto& symbol : symbols) {
    TORCH_CHECK_VALUE(!symbol.empty(), description.where("symbols"), " has an empty symbol");
  }
  Roles roles;
  for (const auto role : kRoleNames) {
    const std::string name(role);
    roles.emplace_back();
    const bool may_be_absent = role == "system" || role == "tool";
    if (may_be_absent && !description.has(name)) continue;
    const auto turn = description.object(name);
    roles.back() = {turn.text("begin"), turn.text("end")};
    for (const auto& key : turn.names()) {
      TORCH_CHECK_VALUE(key == "begin" || key == "end", turn.where(key), " is unknown");
    }
  }
  for (const auto& key : description.names()) {
    const bool is_role = std::find(kRoleNames.begin(), kRoleNames.end(), key) != kRoleNames.end();
    TORCH_CHECK_VALUE(is_role || key == "symbols", description.where(key), " is unknown");
  }
  return {std::move(symbols), std::move(roles)};
}

void ChatTemplate::check(const Tokenizer& tokenizer) const {
  for (const auto& symbol : symbols_) {
    if (symbol != kEndSymbol) tokenizer.control_id(symbol);
  }
}

std::vector<ChatPart> ChatTemplate::render(const Conversation& conversation, TrainedTurns trained) const {
  const auto in_loss = turns_in_loss(conversation.messages, trained);
  Parts parts(symbols_);
  if (roles_.empty()) {
    step37_turns(parts, conversation, in_loss);
  } else {
    described_turns(parts, conversation, in_loss, roles_);
  }
  auto result = parts.take();
  const auto is_picture = [](const ChatPart& part) { return part.kind == Kind::kPicture; };
  const auto num_pictures = std::count_if(result.begin(), result.end(), is_picture);
  TORCH_CHECK_VALUE(num_pictures == static_cast<int64_t>(conversation.pictures.size()), "the chat template writes ",
                    num_pictures, " pictures instead of ", conversation.pictures.size());
  return result;
}

}  // namespace megatron_cpp::step37
