#include "step37/insert/projection.h"

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <utility>

#include "megatron_cpp/tensor_parallel/column_parallel_linear.h"
#include "megatron_cpp/tensor_parallel/linear_function.h"
#include "megatron_cpp/tensor_parallel/row_parallel_linear.h"
#include "parallel/shard.h"

namespace megatron_cpp::step37 {
namespace {

using megatron_cpp::internal::linear_with_communication;
using megatron_cpp::internal::LinearInput;

double init_std(const ImageInsertEmbeddingOptions& options) {
  return std::sqrt(2.0 / static_cast<double>(options.encoder_output_dim()));
}

/// Registers the parameters of `linear`, an unregistered member of `projector`, as those of `projector`.
template <class Projector, class Linear>
void adopt_parameters(Projector& projector, const Linear& linear) {
  projector.weight = projector.register_parameter("weight", linear->weight);
  if (linear->bias.defined()) projector.bias = projector.register_parameter("bias", linear->bias);
}

class ColumnProjector final : public AlignProjector {
 public:
  ColumnProjector(const ImageInsertEmbeddingOptions& options, parallel::GroupPtr tp)
      : linear_(ColumnParallelLinearOptions(options.encoder_output_dim(), options.hidden_size())
                    .bias(options.projector_bias())
                    .init_std(init_std(options)),
                tp),
        accumulate_into_grad_(options.accumulate_into_grad()),
        tp_(std::move(tp)) {
    adopt_parameters(*this, linear_);
  }
  at::Tensor forward(const at::Tensor& rows, bool were_gathered) override {
    // Each rank's columns give one term of the feature gradient; the terms are summed here or by the gather's backward.
    const auto input = were_gathered ? LinearInput::kOwn : LinearInput::kReplicated;
    return linear_with_communication(rows, weight, bias, input, accumulate_into_grad_, tp_);
  }
  std::vector<ParameterShard> own_parameters() const override { return linear_->own_parameters(); }

 private:
  ColumnParallelLinear linear_;
  bool accumulate_into_grad_;
  parallel::GroupPtr tp_;
};

class RowProjector final : public AlignProjector {
 public:
  RowProjector(const ImageInsertEmbeddingOptions& options, parallel::GroupPtr tp)
      : linear_(RowParallelLinearOptions(options.encoder_output_dim(), options.hidden_size())
                    .bias(options.projector_bias())
                    .reduce_output(false)
                    .init_std(init_std(options))
                    .accumulate_into_grad(options.accumulate_into_grad()),
                std::move(tp)) {
    adopt_parameters(*this, linear_);
  }
  at::Tensor forward(const at::Tensor& rows, bool /*were_gathered*/) override { return linear_->forward(rows); }
  std::vector<ParameterShard> own_parameters() const override { return linear_->own_parameters(); }

 private:
  RowParallelLinear linear_;
};

class ReplicatedProjector final : public AlignProjector {
 public:
  ReplicatedProjector(const ImageInsertEmbeddingOptions& options, parallel::GroupPtr tp)
      : init_std_(init_std(options)), accumulate_into_grad_(options.accumulate_into_grad()), tp_(std::move(tp)) {
    weight = register_parameter("weight", at::zeros({options.hidden_size(), options.encoder_output_dim()}));
    if (options.projector_bias()) bias = register_parameter("bias", at::zeros({options.hidden_size()}));
  }
  at::Tensor forward(const at::Tensor& rows, bool /*were_gathered*/) override {
    return linear_with_communication(rows, weight, bias, LinearInput::kOwn, accumulate_into_grad_, tp_);
  }
  std::vector<ParameterShard> own_parameters() const override {
    // A rank's gradient covers only the images that it projects.
    const auto domain = tp_->getSize() > 1 ? GradientDomain::kReplicatedPartial : GradientDomain::kReplicated;
    std::vector<ParameterShard> parameters{
        replicated_parameter("weight", weight, domain, InitialValue::normal(init_std_), true)};
    if (bias.defined()) {
      parameters.push_back(replicated_parameter("bias", bias, domain, InitialValue::constant(0.0), false));
    }
    return parameters;
  }

 private:
  double init_std_;
  bool accumulate_into_grad_;
  parallel::GroupPtr tp_;
};

class NoProjector final : public AlignProjector {
 public:
  at::Tensor forward(const at::Tensor& rows, bool /*were_gathered*/) override { return rows; }
  std::vector<ParameterShard> own_parameters() const override { return {}; }
};

}  // namespace

Part projected_part(ProjectorSharding sharding) {
  switch (sharding) {
    case ProjectorSharding::kColumn:
      return Part::kColumns;
    case ProjectorSharding::kRow:
      return Part::kSummand;
    case ProjectorSharding::kReplicated:
    case ProjectorSharding::kNone:
      return Part::kWhole;
  }
  TORCH_INTERNAL_ASSERT(false);
}

std::shared_ptr<AlignProjector> AlignProjector::make(const ImageInsertEmbeddingOptions& options,
                                                     parallel::GroupPtr tp) {
  const int64_t C = options.encoder_output_dim();
  const int64_t H = options.hidden_size();
  switch (options.projector_sharding()) {
    case ProjectorSharding::kColumn:
      parallel::even_shard_size(H, tp->getSize(), "hidden size");
      return std::make_shared<ColumnProjector>(options, std::move(tp));
    case ProjectorSharding::kRow:
      parallel::even_shard_size(C, tp->getSize(), "encoder_output_dim");
      return std::make_shared<RowProjector>(options, std::move(tp));
    case ProjectorSharding::kReplicated:
      return std::make_shared<ReplicatedProjector>(options, std::move(tp));
    case ProjectorSharding::kNone:
      TORCH_CHECK_VALUE(C == H && !options.projector_bias(),
                        "without projector features are rows of the embedding: "
                        "encoder_output_dim ",
                        C, " must be hidden_size ", H, ", and there is no bias");
      return std::make_shared<NoProjector>();
  }
  TORCH_INTERNAL_ASSERT(false);
}

}  // namespace megatron_cpp::step37
