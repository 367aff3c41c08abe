// The golden published models, and changed copies of them, for tests on all ranks.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "megatron_cpp/checkpoint/safetensors.h"
#include "parallel/collectives.h"
#include "tests/support/environment.h"
#include "tests/support/test_world.h"

namespace megatron_cpp::published_models {

using Tensors = std::map<std::string, at::Tensor>;

/// All tensors of a safetensors file.
inline Tensors tensors_of(const std::filesystem::path& path) {
  const SafetensorsFile file(path);
  Tensors tensors;
  for (const auto& [name, entry] : file.entries()) tensors[name] = file.read(name);
  return tensors;
}

/// Each test has a folder of its own.
class PublishedModels : public testing::Test {
 protected:
  static std::filesystem::path model_path(const std::string& name) { return test_support::cases() / "models" / name; }
  static std::filesystem::path case_path(const std::string& name) {
    return test_support::cases() / "forward" / (name + ".safetensors");
  }

  /// On rank 0, between two barriers: nobody reads what it changes.
  static void on_main(const std::function<void()>& action) {
    parallel::barrier(test_support::world_tp());
    if (test_support::runtime().rank() == 0) action();
    parallel::barrier(test_support::world_tp());
  }

  /// A changed copy of a safetensors file.
  std::filesystem::path changed(const std::filesystem::path& original, const std::filesystem::path& copy,
                                const std::function<void(Tensors&)>& change) const {
    on_main([&] {
      auto tensors = tensors_of(original);
      change(tensors);
      std::vector<NamedTensor> list;
      for (const auto& [name, tensor] : tensors) list.push_back({name, tensor});
      std::filesystem::create_directories(copy.parent_path());
      write_safetensors(copy, list);
    });
    return copy;
  }
  std::filesystem::path changed_input(const std::string& name, const std::function<void(Tensors&)>& change) const {
    return changed(case_path(name), folder_.path() / "in.safetensors", change);
  }
  std::filesystem::path changed_model(const std::string& name, const std::function<void(Tensors&)>& change) const {
    const auto folder = folder_.path() / "model";
    changed(model_path(name) / "model.safetensors", folder / "model.safetensors", change);
    copy_config(name, folder);
    return folder;
  }
  void copy_config(const std::string& name, const std::filesystem::path& folder) const {
    on_main([&] {
      std::filesystem::create_directories(folder);
      std::filesystem::copy_file(model_path(name) / "config.json", folder / "config.json",
                                 std::filesystem::copy_options::overwrite_existing);
    });
  }

  test_support::SharedFolder folder_;
};

}  // namespace megatron_cpp::published_models
