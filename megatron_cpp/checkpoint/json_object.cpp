#include "megatron_cpp/checkpoint/json_object.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "megatron_cpp/checkpoint/json_integer.h"

namespace megatron_cpp::internal {

JsonObject::JsonObject(const nlohmann::ordered_json& json, const std::filesystem::path& file, std::string key)
    : json_(json), file_(file), key_(std::move(key)) {
  TORCH_CHECK_VALUE(json_.is_object(), file_.string(), ": ", key_.empty() ? "the whole" : "key " + key_,
                    " is not a JSON object");
}

std::string JsonObject::text(const std::string& name) const {
  const auto& value = at(name);
  TORCH_CHECK_VALUE(value.is_string(), where(name), " is not a string");
  return value.get<std::string>();
}

int64_t JsonObject::integer(const std::string& name) const {
  const auto value = integer_of(at(name));
  TORCH_CHECK_VALUE(value.has_value(), where(name), " is not a 64-bit integer");
  return *value;
}

double JsonObject::number(const std::string& name) const {
  const auto& value = at(name);
  TORCH_CHECK_VALUE(value.is_number() && std::isfinite(value.get<double>()), where(name), " is not a finite number");
  return value.get<double>();
}

bool JsonObject::boolean(const std::string& name) const {
  const auto& value = at(name);
  TORCH_CHECK_VALUE(value.is_boolean(), where(name), " is not true or false");
  return value.get<bool>();
}

std::vector<int64_t> JsonObject::integers(const std::string& name) const {
  const auto values = integers_of(at(name));
  TORCH_CHECK_VALUE(values.has_value(), where(name), " is not a list of 64-bit integers");
  return *values;
}

std::vector<double> JsonObject::numbers(const std::string& name) const {
  std::vector<double> result;
  for (const auto& element : array_at(name)) {
    TORCH_CHECK_VALUE(element.is_null() || (element.is_number() && std::isfinite(element.get<double>())), where(name),
                      " is not a list of finite numbers");
    result.push_back(element.is_null() ? 0.0 : element.get<double>());
  }
  return result;
}

std::vector<std::string> JsonObject::texts(const std::string& name) const {
  std::vector<std::string> result;
  for (const auto& element : array_at(name)) {
    TORCH_CHECK_VALUE(element.is_string(), where(name), " is not a list of strings");
    result.push_back(element.get<std::string>());
  }
  return result;
}

JsonObject JsonObject::object(const std::string& name) const { return {at(name), file_, path_to(name)}; }

std::vector<JsonObject> JsonObject::objects(const std::string& name) const {
  std::vector<JsonObject> result;
  for (const auto& element : array_at(name)) {
    result.emplace_back(element, file_, fmt::format("{}[{}]", path_to(name), result.size()));
  }
  return result;
}

bool JsonObject::has(const std::string& name) const { return json_.contains(name); }

bool JsonObject::has_value(const std::string& name) const { return has(name) && !at(name).is_null(); }

bool JsonObject::is_array(const std::string& name) const { return has(name) && at(name).is_array(); }

bool JsonObject::is_text(const std::string& name) const { return has(name) && at(name).is_string(); }

std::vector<std::string> JsonObject::names() const {
  std::vector<std::string> result;
  for (const auto& [name, value] : json_.items()) result.push_back(name);
  return result;
}

std::string JsonObject::where(const std::string& name) const {
  return fmt::format("{}: key {}", file_.string(), path_to(name));
}

std::string JsonObject::path_to(const std::string& name) const { return key_.empty() ? name : key_ + "/" + name; }

const nlohmann::ordered_json& JsonObject::at(const std::string& name) const {
  const auto found = json_.find(name);
  TORCH_CHECK_VALUE(found != json_.end(), file_.string(), ": there is no key ", path_to(name));
  return *found;
}

const nlohmann::ordered_json& JsonObject::array_at(const std::string& name) const {
  const auto& array = at(name);
  TORCH_CHECK_VALUE(array.is_array(), where(name), " is not a JSON array");
  return array;
}

std::string read_text(const std::filesystem::path& file) {
  std::ifstream stream(file);
  TORCH_CHECK_VALUE(stream, "cannot open ", file.string(), ": ", std::strerror(errno));
  return {std::istreambuf_iterator<char>(stream), {}};
}

nlohmann::ordered_json read_json_file(const std::filesystem::path& file) { return parse_json(read_text(file), file); }

nlohmann::ordered_json parse_json(const std::string& text, const std::filesystem::path& where) {
  auto json = nlohmann::ordered_json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(!json.is_discarded(), where.string(), " is not JSON");
  return json;
}

}  // namespace megatron_cpp::internal
