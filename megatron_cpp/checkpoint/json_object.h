// Values of a JSON file, with messages that name the file and the key.
#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace megatron_cpp::internal {

/// A JSON object and where it stands. Keeps references: `json` and `file` must outlive it. Every function that returns
/// a value throws c10::ValueError "FILE: key A/B ..." if the key is absent or holds another type.
class JsonObject {
 public:
  /// @throws c10::ValueError if `json` isn't an object.
  JsonObject(const nlohmann::ordered_json& json, const std::filesystem::path& file, std::string key = {});

  std::string text(const std::string& name) const;
  int64_t integer(const std::string& name) const;  ///< true, 1.5 and 1e300 are none
  double number(const std::string& name) const;
  bool boolean(const std::string& name) const;
  std::vector<int64_t> integers(const std::string& name) const;
  std::vector<double> numbers(const std::string& name) const;  ///< an element null is 0
  std::vector<std::string> texts(const std::string& name) const;
  JsonObject object(const std::string& name) const;
  std::vector<JsonObject> objects(const std::string& name) const;

  bool has(const std::string& name) const;        ///< the key is there
  bool has_value(const std::string& name) const;  ///< and isn't null
  bool is_array(const std::string& name) const;
  bool is_text(const std::string& name) const;
  std::vector<std::string> names() const;
  /// "FILE: key PATH", for messages.
  std::string where(const std::string& name) const;

 private:
  std::string path_to(const std::string& name) const;
  const nlohmann::ordered_json& at(const std::string& name) const;
  const nlohmann::ordered_json& array_at(const std::string& name) const;

  const nlohmann::ordered_json& json_;
  const std::filesystem::path& file_;
  std::string key_;
};

/// All of `file`. @throws c10::ValueError naming the file if it can't be read.
std::string read_text(const std::filesystem::path& file);

/// The JSON of `file`, whose outermost value is an object.
/// @throws c10::ValueError naming the file if it can't be read or isn't JSON.
nlohmann::ordered_json read_json_file(const std::filesystem::path& file);

/// The same from a text; `where` is its name in messages.
nlohmann::ordered_json parse_json(const std::string& text, const std::filesystem::path& where);

}  // namespace megatron_cpp::internal
