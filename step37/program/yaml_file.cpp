#include "step37/program/yaml_file.h"

#include <c10/util/Exception.h>
#include <fmt/format.h>
#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/yaml.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>
#include <vector>

namespace megatron_cpp::step37 {
namespace {

std::string read_text(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (file.peek() != std::ifstream::traits_type::eof()) text << file.rdbuf();
  TORCH_CHECK_VALUE(file.is_open() && !file.bad(), "can't read the configuration ", path.string(), ": ",
                    std::strerror(errno));
  return text.str();
}

/// Collects where documents start, and ignores everything else.
class DocumentStarts : public YAML::EventHandler {
 public:
  std::vector<YAML::Mark> marks;

  void OnDocumentStart(const YAML::Mark& mark) override { marks.push_back(mark); }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& /*mark*/, YAML::anchor_t /*anchor*/) override {}
  void OnAlias(const YAML::Mark& /*mark*/, YAML::anchor_t /*anchor*/) override {}
  void OnScalar(const YAML::Mark& /*mark*/, const std::string& /*tag*/, YAML::anchor_t /*anchor*/,
                const std::string& /*value*/) override {}
  void OnSequenceStart(const YAML::Mark& /*mark*/, const std::string& /*tag*/, YAML::anchor_t /*anchor*/,
                       YAML::EmitterStyle::value /*style*/) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark& /*mark*/, const std::string& /*tag*/, YAML::anchor_t /*anchor*/,
                  YAML::EmitterStyle::value /*style*/) override {}
  void OnMapEnd() override {}
};

/// Where a second document starts, if there is one. Not by YAML::LoadAll: yaml-cpp up to 0.8 reads a misplaced comma or
/// bracket as an endless series of empty documents, which LoadAll collects until memory is full.
std::optional<YAML::Mark> second_document(const std::string& text) {
  std::istringstream stream(text);
  YAML::Parser parser(stream);
  DocumentStarts starts;
  while (starts.marks.size() < 2 && parser.HandleNextDocument(starts)) {
  }
  return starts.marks.size() < 2 ? std::nullopt : std::optional(starts.marks.back());
}

}  // namespace

std::string location(const std::filesystem::path& path, const YAML::Mark& mark) {
  return fmt::format("{}:{}", path.string(), mark.line + 1);
}

YAML::Node parse_yaml_file(const std::filesystem::path& path) {
  const auto text = read_text(path);
  YAML::Node document;
  try {
    const auto second = second_document(text);
    TORCH_CHECK_VALUE(!second, location(path, *second), ": a second YAML document, or something out of place");
    document.reset(YAML::Load(text));
  } catch (const YAML::Exception& error) {
    TORCH_CHECK_VALUE(false, location(path, error.mark), ": not YAML: ", error.msg);
  }
  return document;
}

}  // namespace megatron_cpp::step37
