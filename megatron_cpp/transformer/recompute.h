// Intermediate results that the backward pass computes again, so that nobody keeps them.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace megatron_cpp {

/// A part of a model that can be computed again. It gives the same bits each time and changes nothing but what it
/// returns: a choice that rounding or ties could turn, as a routing, is kept from the first pass. Its outputs are new
/// floating-point tensors.
using RecomputedBody = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>& inputs)>;

/// body(inputs), of which only inputs and outputs are kept. The backward pass calls `body` once more and goes backward
/// through it. Parameters get their gradients as always, also in place (TransformerExecution::accumulate_into_grad).
/// Gradients are the same bits as without recompute(), but for an input that the body uses several times and others use
/// too: the body's gradients are added to each other first. A body that begins with at::alias(input) does so either
/// way.
/// @param body        is called at once without gradients, and again in each backward pass, with inputs that are cut
/// off
///                    from the graph. Lives as long as the graph does, and so does what it captures.
/// @param inputs      defined tensors. None needs a gradient: the parameters' flow all the same.
/// @param parameters  leaves that `body` reads besides its inputs. Those left out get no gradient. Hooks of such a
/// tensor
///                    (register_hook) are called twice, those of its gradient accumulator once.
/// @return            body's outputs, with gradient if an input or a parameter needs one. If none does, or in no-grad
///                    mode, `body` is called once and that is all.
/// Comm: that of the forward pass of `body`, and again at the beginning of its backward pass. A rank's autograd engine
/// runs what is ready in the reverse order in which it was recorded, and the whole second pass within one such step; so
/// ranks that record the same graph communicate in the same order. Double backward throws c10::NotImplementedError.
std::vector<at::Tensor> recompute(const RecomputedBody& body, const std::vector<at::Tensor>& inputs,
                                  const std::vector<at::Tensor>& parameters = {});

/// consume(produce(input)) without what lies between: the operations of `consume` keep `produce`'s result for their
/// backward pass, but its memory is freed as soon as they are done. The backward pass of `consume` begins by computing
/// it again, into the tensors that they kept; no operation of `consume` is repeated. Gradients are the same bits as
/// those of consume(produce(input)). (Megatron-Core: CheckpointWithoutOutput.)
/// @param produce  a new tensor from `input` and parameters, the same bits each time. Is called at once, and again
///                 without gradients; its own backward pass keeps what it always does. Lives as long as the graph does,
///                 and so does what it captures.
/// @param consume  is called once. It doesn't write to its argument. Every gradient of its argument comes back through
///                 a tensor that it returns; none of these is a view of the argument.
/// @return         consume's tensors; undefined ones, too. If neither `input` nor a parameter of `produce` needs a
///                 gradient, or in no-grad mode, nothing is freed.
/// No communication but that of both. Backward passes through a retained graph keep what was computed again.
std::vector<at::Tensor> recompute_between(const std::function<at::Tensor(const at::Tensor&)>& produce,
                                          const at::Tensor& input,
                                          const std::function<std::vector<at::Tensor>(const at::Tensor&)>& consume);

}  // namespace megatron_cpp
