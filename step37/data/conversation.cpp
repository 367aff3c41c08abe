#include "step37/data/conversation.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <utility>

#include "megatron_cpp/checkpoint/json_integer.h"
#include "step37/data/json_lines.h"
#include "step37/data/utf8.h"

namespace megatron_cpp::step37 {
namespace {

using OrderedJson = nlohmann::ordered_json;
using Role = ChatMessage::Role;

/// A value that is there and isn't null.
const OrderedJson* value_at(const OrderedJson& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

/// The value of the first of two keys that is there.
const OrderedJson* value_at(const OrderedJson& object, const char* key, const char* other) {
  const auto* value = value_at(object, key);
  return value != nullptr ? value : value_at(object, other);
}

/// Tokenizers lose NUL.
std::string text_of(const OrderedJson& value, const std::string& what) {
  TORCH_CHECK_VALUE(value.is_string(), what, " isn't text");
  auto text = value.get<std::string>();
  TORCH_CHECK_VALUE(text.find('\0') == std::string::npos, what, " has a NUL character");
  return text;
}

const OrderedJson& list_of(const OrderedJson& value, const std::string& what) {
  TORCH_CHECK_VALUE(value.is_array(), what, " isn't a list");
  return value;
}

/// As Python's repr writes it: the shortest digits, with an exponent from 1e16 and below 1e-4.
std::string python_number(double value) {
  constexpr double kBeyondIntegers = 0x1p63;
  TORCH_CHECK_VALUE(std::abs(value) < kBeyondIntegers, "a number of tools or arguments is beyond 64 bits");
  const double size = std::abs(value);
  const bool has_exponent = size != 0.0 && (size < 1e-4 || size >= 1e16);
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value,
                                 has_exponent ? std::chars_format::scientific : std::chars_format::fixed);
  std::string text(buffer, end.ptr);
  return has_exponent || text.find('.') != std::string::npos ? text : text + ".0";
}

/// As Python's json.dumps writes it.
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        result += "\\\"";
        break;
      case '\\':
        result += "\\\\";
        break;
      case '\n':
        result += "\\n";
        break;
      case '\r':
        result += "\\r";
        break;
      case '\t':
        result += "\\t";
        break;
      case '\b':
        result += "\\b";
        break;
      case '\f':
        result += "\\f";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          result += fmt::format("\\u{:04x}", static_cast<unsigned char>(c));
        } else {
          result += c;
        }
    }
  }
  return result + '"';
}

std::string python_text(const OrderedJson& value, const std::string& what) {
  if (value.is_string()) return text_of(value, what);
  if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
  if (value.is_null()) return "None";
  return python_json(value);
}

std::vector<ToolCall> tool_calls_in(const OrderedJson& message, const std::string& where) {
  std::vector<ToolCall> calls;
  const auto* list = value_at(message, "tool_calls");
  if (list == nullptr) return calls;
  for (const auto& element : list_of(*list, where + ": tool_calls")) {
    const auto what = fmt::format("{}: tool call {}", where, calls.size() + 1);
    TORCH_CHECK_VALUE(element.is_object(), what, " isn't an object");
    const auto* function = value_at(element, "function");
    const auto& described = function == nullptr ? element : *function;
    TORCH_CHECK_VALUE(described.is_object(), what, ": function isn't an object");
    const auto* name = value_at(described, "name");
    TORCH_CHECK_VALUE(name != nullptr, what, " has no name");
    ToolCall call{text_of(*name, what + ": name"), {}};
    if (const auto given = described.find("arguments"); given != described.end()) {
      const auto arguments = given->is_string() ? json_object_in(given->get<std::string>()) : *given;
      TORCH_CHECK_VALUE(arguments.is_object(), what, ": arguments isn't an object");
      for (const auto& [key, value] : arguments.items()) {
        call.arguments.emplace_back(text_of(key, what + ": an argument's name"), python_text(value, what + ": " + key));
      }
    }
    calls.push_back(std::move(call));
  }
  return calls;
}

class ConversationReader {
 public:
  ConversationReader(const OrderedJson& json, const std::vector<std::string>& pictures) {
    const auto* images = value_at(json, "images");
    if (images == nullptr) {
      images_ = pictures;
    } else {
      for (const auto& image : list_of(*images, "images")) images_.push_back(path_of(image));
    }
  }

  Conversation read(const OrderedJson& json) {
    const auto* messages = value_at(json, "messages", "conversations");
    TORCH_CHECK_VALUE(messages != nullptr, "it has neither messages nor conversations");
    TORCH_CHECK_VALUE(list_of(*messages, "messages").size() > 0, "it has no message");
    const auto* tools = value_at(json, "tools");
    for (const auto& element : *messages) {
      const auto where = fmt::format("message {}", result_.messages.size() + 1);
      TORCH_CHECK_VALUE(element.is_object(), where, " isn't an object");
      if (result_.messages.empty()) {
        if (tools == nullptr) tools = value_at(element, "tool_schemas");
        if (const auto* effort = value_at(element, "reasoning_effort")) {
          result_.reasoning_effort = text_of(*effort, where + ": reasoning_effort");
        }
      }
      result_.messages.push_back(message(element, where));
    }
    if (tools != nullptr) {
      for (const auto& tool : list_of(*tools, "tools")) {
        TORCH_CHECK_VALUE(tool.is_object(), "tool ", result_.tools.size() + 1, " isn't an object");
        result_.tools.push_back(python_json(tool));
      }
    }
    TORCH_CHECK_VALUE(num_placeholders_ == images_.size(), num_placeholders_, " placeholders <image> for ",
                      images_.size(), " images");
    return std::move(result_);
  }

 private:
  /// A path, or [path, 0], as Megatron-Bridge's stepfun/data takes it.
  static std::string path_of(const OrderedJson& image) {
    const bool is_list = image.is_array() && !image.empty();
    if (is_list && image.size() > 1) {
      TORCH_CHECK_VALUE(image.size() == 2 && megatron_cpp::internal::integer_of(image[1]) == 0,
                        "an image isn't [path, 0]: crops can't be given, they are cut here");
    }
    auto path = text_of(is_list ? image[0] : image, "a path in images");
    TORCH_CHECK_VALUE(!path.empty(), "a path in images is empty");
    return path;
  }

  ChatMessage message(const OrderedJson& json, const std::string& where) {
    const auto* role = value_at(json, "role");
    TORCH_CHECK_VALUE(role != nullptr, where, " has no role");
    ChatMessage result;
    result.role = role_of(text_of(*role, where + ": role"), where);
    if (result.role == Role::kAssistant) {
      if (const auto* reasoning = value_at(json, "reasoning_content")) {
        result.reasoning = text_of(*reasoning, where + ": reasoning_content");
        take_pictures_of(*result.reasoning);
      }
      result.tool_calls = tool_calls_in(json, where);
      if (const auto* mask = value_at(json, "loss_mask")) {
        const auto number =
            mask->is_boolean() ? int64_t{mask->get<bool>()} : megatron_cpp::internal::integer_of(*mask).value_or(2);
        TORCH_CHECK_VALUE(number == 0 || number == 1, where, ": loss_mask is neither 0 nor 1");
        result.in_loss = number == 1;
      }
    } else if (result.role == Role::kSystem && !result_.messages.empty()) {
      const auto name = json.find("name");
      result.is_observation = name != json.end() && *name == "observation";
    }
    const auto* content = value_at(json, "content");
    TORCH_CHECK_VALUE(content != nullptr || !result.tool_calls.empty(), where, " has no content");
    if (content != nullptr) result.content = content_of(*content, where);
    return result;
  }

  static Role role_of(const std::string& name, const std::string& where) {
    if (name == "system") return Role::kSystem;
    if (name == "user") return Role::kUser;
    if (name == "assistant") return Role::kAssistant;
    TORCH_CHECK_VALUE(name == "tool", where, ": role ", name, " is none of system, user, assistant, tool");
    return Role::kTool;
  }

  std::string content_of(const OrderedJson& content, const std::string& where) {
    if (content.is_object()) return text_part(content, where + ": content");
    if (!content.is_array()) {
      auto text = text_of(content, where + ": content");
      take_pictures_of(text);
      return text;
    }
    std::string result;
    bool is_behind_text = false;
    size_t number = 0;
    for (const auto& part : content) {
      const auto what = fmt::format("{}: part {}", where, ++number);
      TORCH_CHECK_VALUE(part.is_object(), what, " isn't an object");
      const auto* type = value_at(part, "type");
      TORCH_CHECK_VALUE(type != nullptr, what, " has no type");
      const bool is_text = *type == "text";
      if (is_text) {
        if (is_behind_text) result += ' ';
        result += text_part(part, what);
      } else {
        TORCH_CHECK_VALUE(*type == "image", what, ": its type is neither text nor image");
        image_part(part);
        result += kPicturePlaceholder;
      }
      is_behind_text = is_text;
    }
    return result;
  }

  std::string text_part(const OrderedJson& part, const std::string& what) {
    const auto* value = value_at(part, "value", "text");
    TORCH_CHECK_VALUE(value != nullptr, what, " has no text");
    auto text = text_of(*value, what);
    take_pictures_of(text);
    return text;
  }

  void image_part(const OrderedJson& part) {
    if (const auto* path = value_at(part, "image", "path")) {
      result_.pictures.push_back(path_of(*path));
    } else {
      take_picture();
    }
  }

  void take_pictures_of(const std::string& text) {
    for (auto found = text.find(kPicturePlaceholder); found != std::string::npos;
         found = text.find(kPicturePlaceholder, found + kPicturePlaceholder.size())) {
      take_picture();
    }
  }

  void take_picture() {
    if (num_placeholders_ < images_.size()) result_.pictures.push_back(images_[num_placeholders_]);
    ++num_placeholders_;
  }

  Conversation result_;
  std::vector<std::string> images_;
  size_t num_placeholders_ = 0;  ///< for which `images_` has a path or should have
};

}  // namespace

std::string python_json(const OrderedJson& value) {
  if (value.is_string()) return quoted(value.get<std::string>());
  if (value.is_number_float()) return python_number(value.get<double>());
  if (!value.is_structured()) return value.dump();
  std::string result;
  const bool is_object = value.is_object();
  for (const auto& [key, element] : value.items()) {
    if (!result.empty()) result += ", ";
    if (is_object) result += quoted(key) + ": ";
    result += python_json(element);
  }
  return (is_object ? "{" : "[") + result + (is_object ? "}" : "]");
}

Conversation conversation_in(const OrderedJson& json, const std::vector<std::string>& pictures) {
  return ConversationReader(json, pictures).read(json);
}

}  // namespace megatron_cpp::step37
