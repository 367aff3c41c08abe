#include "step37/program/data_sets.h"

#include <c10/util/Exception.h>
#include <yaml-cpp/yaml.h>

#include <set>

#include "step37/program/config_values.h"

namespace megatron_cpp::step37 {
namespace {

template <class Value>
void read(const YAML::Node& node, const std::string& where, const std::string& key, Value& value) {
  // "\xff" isn't UTF-8, so no type accepts it.
  const auto must_be = read_value(node.IsScalar() ? node.Scalar() : "\xff", value);
  TORCH_CHECK_VALUE(must_be.empty(), where, ": ", key, " must be ", must_be, ", got ",
                    node.IsScalar() ? node.Scalar() : "a section or a list");
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
      read(entry.second, where, key, kind);
      const auto must_be = read_value(kind, section.kind);
      TORCH_CHECK_VALUE(must_be.empty(), where, ": kind ", kind, " is not ", must_be);
    } else if (key == "path") {
      read(entry.second, where, key, section.path);
    } else if (key == "weight") {
      read(entry.second, where, key, section.weight);
      TORCH_CHECK_VALUE(section.weight >= 0.0, where, ": weight ", entry.second.Scalar(), " is negative");
    } else if (key == "shuffle") {
      read(entry.second, where, key, section.shuffle);
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
    out << YAML::Key << "kind" << YAML::Value << write_value(section.kind);
    out << YAML::Key << "path" << YAML::Value << section.path;
    if (section.weight != defaults.weight) out << YAML::Key << "weight" << YAML::Value << write_value(section.weight);
    if (section.shuffle != defaults.shuffle)
      out << YAML::Key << "shuffle" << YAML::Value << write_value(section.shuffle);
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
