// Chat templates: how a conversation becomes text, control symbols and pictures, and what of it counts in the loss.
//
// Templates are code or a short description, not Jinja: a template that is text would turn what a user writes into
// control symbols. Here the text of a message stays text, whatever it spells.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "step37/data/tokenizer.h"

namespace megatron_cpp::step37 {

/// What stands for a picture in the text of a message.
inline constexpr std::string_view kPicturePlaceholder = "<image>";

/// The symbol of a template that is SampleFormat::end_id, whatever the tokenizer calls it.
inline constexpr std::string_view kEndSymbol = "</s>";

/// A function that an assistant calls, and the texts of its arguments.
struct ToolCall {
  std::string name;
  std::vector<std::pair<std::string, std::string>> arguments;  ///< name and value, in order
};

/// One turn of a conversation.
struct ChatMessage {
  enum class Role { kSystem, kUser, kAssistant, kTool };
  Role role = Role::kUser;
  std::string content = {};                   ///< UTF-8; each kPicturePlaceholder is a picture
  std::optional<std::string> reasoning = {};  ///< of an assistant, if it is given apart from the content
  std::vector<ToolCall> tool_calls = {};      ///< of an assistant
  bool is_observation = false;                ///< a system message whose name is "observation"
  bool in_loss = true;                        ///< of an assistant: false switches its loss off
};

/// Messages, and what a template writes before them.
struct Conversation {
  std::vector<ChatMessage> messages;
  std::vector<std::string> tools = {};               ///< descriptions, each a JSON object as text
  std::optional<std::string> reasoning_effort = {};  ///< "high"
  std::vector<std::string> pictures = {};            ///< paths, in the order of the placeholders
};

/// A piece of a rendered conversation. Adjacent texts are encoded together, as one text.
struct ChatPart {
  enum class Kind {
    kText,     ///< never becomes a symbol
    kSymbol,   ///< `text` is its name
    kPicture,  ///< the next picture of the conversation
  };
  Kind kind = Kind::kText;
  std::string text = {};
  bool in_loss = false;

  bool operator==(const ChatPart&) const = default;
};

/// Which assistant turns count in the loss, unless ChatMessage::in_loss is false.
enum class TrainedTurns {
  kAfterLastUser,  ///< those behind the last user turn, as Megatron-Bridge's stepfun/data does it
  kAll,
};

/// Turns conversations into parts. A value; its functions are pure.
class ChatTemplate {
 public:
  /// The beginning and end of the turns of one role. An assistant's beginning is the generation prompt.
  struct Turn {
    std::string begin;
    std::string end;
  };

  /// A built-in template:
  ///   - "step37": that of the released model, symbols <|im_start|>, <|im_end|>, <think>, </think> and those of tools;
  ///   - "chatml": <|im_start|>ROLE, line feed, content, <|im_end|>, line feed; no tools, no reasoning;
  ///   - "plain": no symbols, for tokenizers that have none: each turn is its content and a line feed; an assistant's
  ///     ends in the end token instead.
  /// @throws c10::ValueError naming the template if there is none of that name.
  static ChatTemplate named(std::string_view name);

  /// A template described in a JSON file:
  /// {"symbols": ["<|im_start|>"], "user": {"begin": "<|im_start|>user\n", "end": "\n"}, "assistant": {...}}, where
  /// "system" and "tool" may be left out: messages of that role are refused then. The symbol </s> is the end token.
  /// @throws c10::ValueError naming the file and the key.
  static ChatTemplate load(const std::filesystem::path& file);

  /// The control symbols that a tokenizer needs beside picture symbols and end token: for Tokenizer::train.
  const std::vector<std::string>& symbols() const { return symbols_; }

  /// @throws c10::ValueError naming the symbol and the tokenizer if it lacks one, or has it as a piece of text.
  void check(const Tokenizer& tokenizer) const;

  /// What the turns add to each other. The loss counts what an assistant turn adds behind the generation prompt; behind
  /// another assistant turn, whole.
  /// @throws c10::ValueError with the reason if the last message isn't an assistant's, no user turn is before it, a
  ///         role has no place in the template, or the template would leave out a picture.
  std::vector<ChatPart> render(const Conversation& conversation, TrainedTurns trained) const;

 private:
  using Roles = std::vector<std::optional<Turn>>;  ///< by ChatMessage::Role

  ChatTemplate(std::vector<std::string> symbols, Roles roles)
      : symbols_(std::move(symbols)), roles_(std::move(roles)) {}

  std::vector<std::string> symbols_;
  Roles roles_;  ///< empty: that of the released model
};

}  // namespace megatron_cpp::step37
