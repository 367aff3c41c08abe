#include "step37/program/data_sets.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>
#include <vector>

namespace megatron_cpp::step37 {
namespace {

const std::vector<std::pair<std::string, DataSetKind>>& kind_names() {
  static const std::vector<std::pair<std::string, DataSetKind>> names{{"captions", DataSetKind::kCaptions}};
  return names;
}

std::string kind_name(DataSetKind kind) {
  return std::ranges::find(kind_names(), kind, [](const auto& entry) { return entry.second; })->first;
}

DataSetKind kind_from(const std::string& text, const std::string& where) {
  const auto found = std::ranges::find(kind_names(), text, [](const auto& entry) { return entry.first; });
  std::string names;
  for (const auto& [name, kind] : kind_names()) names += (names.empty() ? "" : ", ") + name;
  TORCH_CHECK_VALUE(found != kind_names().end(), where, ": kind ", text, " is not one of ", names);
  return found->second;
}

template <class Value>
void read(const YAML::Node& node, const std::string& where, const std::string& key, const char* what, Value& value) {
  TORCH_CHECK_VALUE(node.IsScalar() && YAML::convert<Value>::decode(node, value), where, ": ", key, " must be ", what,
                    ", got ", node.IsScalar() ? node.Scalar() : "a section or a list");
}

DataSetSection section_of(const YAML::Node& node, const std::string& where) {
  TORCH_CHECK_VALUE(node.IsMap(), where, " must hold keys, as {kind: captions, path: data/pictures}");
  DataSetSection section;
  std::set<std::string> given;
  for (const auto& entry : node) {
    const auto key = entry.first.IsScalar() ? entry.first.Scalar() : "";
    TORCH_CHECK_VALUE(given.insert(key).second, where, ": the key ", key, " is given twice");
    if (key == "kind") {
      std::string kind;
      read(entry.second, where, key, "text", kind);
      section.kind = kind_from(kind, where);
    } else if (key == "path") {
      read(entry.second, where, key, "text", section.path);
    } else if (key == "weight") {
      read(entry.second, where, key, "a number", section.weight);
      TORCH_CHECK_VALUE(std::isfinite(section.weight) && section.weight >= 0.0, where, ": weight ",
                        entry.second.Scalar(), " is negative or not finite");
    } else if (key == "shuffle") {
      read(entry.second, where, key, "true or false", section.shuffle);
    } else {
      TORCH_CHECK_VALUE(false, where, " has no key ", key, ": there are kind, path, weight, shuffle");
    }
  }
  TORCH_CHECK_VALUE(!section.path.empty(), where, " lacks path, which has no default");
  return section;
}

}  // namespace

std::string to_text(const DataSetSections& sets) {
  if (sets.empty()) return "";
  const DataSetSection defaults;
  YAML::Emitter out;
  out.SetMapFormat(YAML::Flow);
  out << YAML::BeginMap;
  for (const auto& [name, section] : sets) {
    out << YAML::Key << name << YAML::Value << YAML::BeginMap;
    out << YAML::Key << "kind" << YAML::Value << kind_name(section.kind);
    out << YAML::Key << "path" << YAML::Value << section.path;
    if (section.weight != defaults.weight)
      out << YAML::Key << "weight" << YAML::Value << fmt::to_string(section.weight);
    if (section.shuffle != defaults.shuffle) out << YAML::Key << "shuffle" << YAML::Value << section.shuffle;
    out << YAML::EndMap;
  }
  out << YAML::EndMap;
  return out.c_str();
}

DataSetSections data_sets_from_text(const std::string& text) {
  YAML::Node root;
  try {
    root.reset(YAML::Load(text));
  } catch (const YAML::Exception& error) {
    TORCH_CHECK_VALUE(false, "not YAML: ", error.msg);
  }
  if (root.IsNull()) return {};
  TORCH_CHECK_VALUE(root.IsMap(), "names are missing: expected {name: {kind: captions, path: data/pictures}}");
  DataSetSections sets;
  for (const auto& entry : root) {
    const auto name = entry.first.IsScalar() ? entry.first.Scalar() : "";
    const auto other = name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_");
    TORCH_CHECK_VALUE(!name.empty() && other == std::string::npos, "the name '", name,
                      "' of a data set has other characters than letters, digits, - and _");
    TORCH_CHECK_VALUE(!sets.contains(name), "the data set ", name, " is given twice");
    sets[name] = section_of(entry.second, "the data set " + name);
  }
  return sets;
}

}  // namespace megatron_cpp::step37
