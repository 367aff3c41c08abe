// What a GPU is checked with: each part is one subcommand. scripts/gpu_check.sh bundles it with what it needs and runs
// the parts, docs/gpu.md says what they show.
//
//   gpu_check layers [--rows FILE]
//
// Appends a JSON object a line to FILE and prints it. Exit status 1 if something was wrong. Without a GPU parts run on
// the CPU at small sizes, or say that they need one.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <functional>
#include <string>
#include <utility>

#include "benchmarks/gpu_check/check.h"
#include "parallel/agree.h"
#include "parallel/host_memory.h"

int main(int argc, char** argv) {
  megatron_cpp::parallel::keep_freed_host_memory();  // as the step37 program does
  CLI::App app("Checks a GPU, part by part.", "gpu_check");
  app.require_subcommand(1);
  std::filesystem::path rows;
  megatron_cpp::gpu_check::TraceArguments trace;
  megatron_cpp::gpu_check::Part part;
  const auto add = [&](const std::string& name, const std::string& what, megatron_cpp::gpu_check::Part run) {
    auto* command = app.add_subcommand(name, what);
    command->add_option("--rows", rows, "File to append results to, a JSON object a line");
    command->callback([&part, run = std::move(run)] { part = run; });
    return command;
  };
  add("machine", "GPU, driver, CUDA, NCCL, processor", megatron_cpp::gpu_check::check_machine);
  add("product", "A bfloat16 product and a copy within the device's memory", megatron_cpp::gpu_check::check_product);
  add("nccl", "ProcessGroupNCCL of one rank, each collective", megatron_cpp::gpu_check::check_collectives);
  add("tower", "The vision tower on 1, 4 and 8 pictures", megatron_cpp::gpu_check::check_tower);
  add("layers", "Decoder layers and output layer at one rank's widths of eight", megatron_cpp::gpu_check::check_layers);
  add("attention", "Flash attention beside scaled_dot_product_attention", megatron_cpp::gpu_check::check_attention);
  add("insert", "The fused image insert beside text and products", megatron_cpp::gpu_check::check_insert);
  add("adamw", "AdamW against the memory's speed", megatron_cpp::gpu_check::check_adamw);
  auto* traced = add("trace", "One training step under the profiler",
                     [&](const megatron_cpp::gpu_check::Target& target, megatron_cpp::gpu_check::Report& report) {
                       megatron_cpp::gpu_check::check_trace(target, report, trace);
                     });
  traced->add_option("--config", trace.config, "Configuration of the run (YAML)")->required();
  traced->add_option("--trace", trace.trace, "File for the trace of all steps (JSON, for a trace viewer)");
  traced->add_option("overrides", trace.overrides, "section.key=value, in place of the file's value");
  CLI11_PARSE(app, argc, argv);
  try {
    const megatron_cpp::gpu_check::Target target;
    megatron_cpp::gpu_check::Report report(rows);
    part(target, report);
    return report.any_wrong() ? 1 : 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gpu_check: %s\n", megatron_cpp::parallel::error_text(error).c_str());
    return 2;
  }
}
