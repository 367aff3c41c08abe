#include "step37/program/data_sets.h"

#include <c10/util/Exception.h>
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <map>
#include <vector>

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

/// Calls visit(key, member, kinds that have the key; none: all of them).
template <class Section, class Visit>
void visit_keys(Section& section, const Visit& visit) {
  using enum DataSetKind;
  using Kinds = std::vector<DataSetKind>;
  const Kinds chats = {kConversations, kWebDataset, kFlickr8k};
  visit("kind", section.kind, Kinds());
  visit("path", section.path, Kinds());
  visit("weight", section.weight, Kinds());
  visit("shuffle", section.shuffle, Kinds());
  visit("pictures", section.pictures, Kinds{kConversations, kTokens, kFlickr8k});
  visit("chat_template", section.chat_template, chats);
  visit("turns", section.turns, chats);
  visit("caption", section.caption, Kinds{kFlickr8k});
  visit("prompt", section.prompt, Kinds{kFlickr8k});
}

bool has_key(DataSetKind kind, const std::vector<DataSetKind>& kinds) {
  return kinds.empty() || std::ranges::find(kinds, kind) != kinds.end();
}

DataSetSection section_of(const YAML::Node& node, const std::string& where) {
  TORCH_CHECK_VALUE(node.IsMap(), where, " must hold keys, as {kind: captions, path: data/pictures}");
  std::map<std::string, YAML::Node> values;
  for (const auto& entry : node) {
    const auto key = entry.first.IsScalar() ? entry.first.Scalar() : "";
    TORCH_CHECK_VALUE(values.emplace(key, entry.second).second, where, ": the key ", key, " is given twice");
  }
  DataSetSection section;
  std::string keys;
  visit_keys(section, [&](const std::string& key, auto& member, const std::vector<DataSetKind>& kinds) {
    if (!has_key(section.kind, kinds)) return;
    keys.append(keys.empty() ? "" : ", ").append(key);
    if (const auto value = values.extract(key)) read(value.mapped(), where, key, member);
  });
  TORCH_CHECK_VALUE(values.empty(), where, " of kind ", write_value(section.kind), " has no key ",
                    values.empty() ? "" : values.begin()->first, ": there are ", keys);
  TORCH_CHECK_VALUE(section.weight >= 0.0, where, ": weight ", section.weight, " is negative");
  TORCH_CHECK_VALUE(!section.path.empty(), where, " lacks path, which has no default");
  return section;
}

}  // namespace

std::string to_text(const DataSetSections& sets) {
  if (sets.empty()) return "";
  const DataSetSection defaults;
  std::map<std::string, std::string> values_by_default;
  visit_keys(defaults, [&](const std::string& key, const auto& member, const auto& /*kinds*/) {
    values_by_default[key] = write_value(member);
  });
  YAML::Emitter out;
  out.SetMapFormat(YAML::Flow);
  out << YAML::BeginMap;
  for (const auto& [name, section] : sets) {
    out << YAML::Key << name << YAML::Value << YAML::BeginMap;
    visit_keys(section, [&](const std::string& key, const auto& member, const std::vector<DataSetKind>& /*kinds*/) {
      const auto text = write_value(member);
      if (key == "kind" || text != values_by_default.at(key)) out << YAML::Key << key << YAML::Value << text;
    });
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
