// Conversations in JSON.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "step37/data/chat_template.h"

namespace megatron_cpp::step37 {

/// Reads {"messages": [{"role": "user", "content": "<image>\nWhat is this?"}, ...], "images": ["a.png"]}:
///   - "conversations" is another name of "messages";
///   - role: system, user, assistant, tool; a system message that isn't the first may have the name "observation";
///   - content: text, or a list of {"type": "text", "text" or "value": ...} and {"type": "image", "image" or "path":
///   ...}.
///     Two texts in a row get a space between them. An image part is a placeholder; without a path of its own it takes
///     the next of "images", as placeholders in text do;
///   - an assistant's: "reasoning_content", "tool_calls" ([{"function": {"name", "arguments"}}], or without "function";
///     arguments an object, or one as text), which may stand for content, and "loss_mask": 0 or 1;
///   - "tools", or "tool_schemas" in the first message: a list of objects; "reasoning_effort" in the first message.
/// Other keys are ignored. Values of arguments and descriptions of tools become text as Python's str and json.dumps
/// print them, which is what transformers' chat templates do.
/// @param pictures  instead of "images" if that key isn't there
/// @throws c10::ValueError with the reason ("message 2 has no role"), also if there are more or fewer placeholders than
///         images.
Conversation conversation_in(const nlohmann::ordered_json& json, const std::vector<std::string>& pictures = {});

/// As Python's json.dumps(value, ensure_ascii=False) prints it.
/// @throws c10::ValueError for numbers beyond 64 bits, of which the parser has lost digits.
std::string python_json(const nlohmann::ordered_json& value);

}  // namespace megatron_cpp::step37
