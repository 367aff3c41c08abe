// Finds the first thing in a training step that isn't finite.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "megatron_cpp/parameters/parameter_shard.h"
#include "parallel/group.h"

namespace megatron_cpp::internal {

/// Watches a repeated pass of a step, on the thread that creates it; one at a time. It reads the output of every
/// operator that LibTorch's dispatcher calls in a forward pass, which takes much longer than the pass itself. NaN and
/// +infinity count: masks are filled with -infinity on purpose.
///
/// Operators know no modules; each module tells that it begins by ParallelModule::use_parameters.
class NotFiniteSearch {
 public:
  /// Looks at all parameters, which must be complete (Trainer::finish_gather).
  /// @param parameters  all of the model, trained or not; equal names on every rank. Must outlive the search.
  explicit NotFiniteSearch(const std::vector<ParameterShard>& parameters);
  ~NotFiniteSearch();
  NotFiniteSearch(const NotFiniteSearch&) = delete;
  NotFiniteSearch& operator=(const NotFiniteSearch&) = delete;

  /// Before the forward pass of a micro-batch, and after it, with its losses.
  void begin_forward(int64_t micro_batch);
  void end_forward(const at::Tensor& losses);
  /// After the backward pass of the micro-batch.
  /// @param parameters  in the order in which backward completes their gradients, which nothing has reduced yet.
  void look_at_gradients(const std::vector<ParameterShard>& parameters);

  /// What was first, as a sentence: of all ranks' findings a parameter comes before operators, these before gradients,
  /// of each kind the one of the lowest micro-batch, then the one that its rank came to first. Collective over `world`:
  /// an all-gather and two broadcasts.
  /// @param names  the samples of a micro-batch of this rank; may be empty.
  std::string agreed(const std::function<std::vector<std::string>(int64_t)>& names,
                     const parallel::GroupPtr& world) const;

 private:
  enum class Kind : int64_t { kParameter, kOperator, kLoss, kGradient, kNothing };

  void find(Kind kind, int64_t place, const std::string& text);
  static std::unique_ptr<at::ObserverContext> begin_operator(const at::RecordFunction& function);
  static void end_operator(const at::RecordFunction& function, at::ObserverContext* context);

  Kind kind_ = Kind::kNothing;
  int64_t place_ = 0;  ///< of the finding, among others of its kind
  std::string text_;
  int64_t found_in_ = 0;  ///< micro-batch

  int64_t micro_batch_ = 0;
  bool in_forward_ = false;
  int64_t num_operators_ = 0;
  std::string module_;                                           ///< that began last; empty: none has
  std::map<std::shared_ptr<BeforeUse>, BeforeUse> before_uses_;  ///< as they were
  at::CallbackHandle callback_ = 0;
};

/// Of "a.b.weight" and "a.b.bias": "a.b".
std::string common_module(const std::string& a, const std::string& b);

/// "a, b and 3 more": at most 64 names.
std::string listed(const std::vector<std::string>& names);

}  // namespace megatron_cpp::internal
