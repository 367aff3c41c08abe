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

}  // namespace megatron_cpp
