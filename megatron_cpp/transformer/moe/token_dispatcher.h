// Brings tokens to the ranks of their experts, and the experts' outputs back.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "megatron_cpp/transformer/execution.h"
#include "megatron_cpp/transformer/moe/experts.h"
#include "parallel/shard.h"

namespace megatron_cpp {

/// One layer's dispatch of one batch, as often as it is computed. No token is dropped, whatever the experts' loads are.
///
/// A token is sent once to each rank of `ep` that has some of its experts, together with the numbers of its experts and
/// their weights, however many of them that rank has; what comes back is one row, the sum of that rank's experts. So
/// ep = 1 sends nothing over ep. Within `etp` the tokens are gathered, since each rank has a slice of every expert, and
/// the outputs are reduce-scattered.
///
/// Rows stay in the order of ranks and tokens, and sums are added in the order of the ranks of `ep`: the same bits
/// every time. Every rank calls every collective, also one that has no token or no expert in use.
class TokenDispatcher {
 public:
  /// Takes this rank's routing and learns from the others how many tokens come.
  /// @param experts      [n, K], Routing::experts of this rank's n tokens.
  /// @param own_experts  of this rank.
  /// Comm: 1 all-gather of E + ep numbers over etp_ep, if that has several ranks. Collective over etp_ep. Waits for the
  /// device: the splits of the all-to-alls are needed on the host.
  TokenDispatcher(at::Tensor experts, int64_t num_experts, parallel::Range own_experts, const ModelGroups& groups);

  /// @param tokens   [n, H], this rank's.
  /// @param weights  [n, K], Routing::weights of these.
  /// Comm: all-to-all over ep of the rows, and of 2K numbers for each; then an all-gather of both over etp. Backward:
  /// the same ways back. Collective over ep and etp.
  ExpertTokens dispatch(const at::Tensor& tokens, const at::Tensor& weights) const;

  /// @param output  [M, H], this rank's experts' sums (summands over etp) for the tokens that dispatch() gave.
  /// @return        [n, H]: the sum of all experts of each of this rank's tokens.
  /// Comm: reduce-scatter over etp, then all-to-all over ep; backward the same ways back. Collective over etp and ep.
  at::Tensor combine(const at::Tensor& output) const;

  /// As given to the constructor.
  const at::Tensor& experts() const { return experts_; }

  /// Tokens of each of the E experts, over the ranks of etp_ep.
  const std::vector<int64_t>& tokens_per_expert() const { return tokens_per_expert_; }

 private:
  ModelGroups groups_;
  at::Tensor experts_;
  parallel::Range own_experts_;
  at::Tensor sent_tokens_;  ///< [.] int64: numbers of the tokens for each rank of ep, one list after the other
  std::vector<int64_t> send_splits_;     ///< tokens for each rank of ep
  std::vector<int64_t> receive_splits_;  ///< tokens from each rank of ep
  std::vector<int64_t> gathered_rows_;   ///< tokens that each rank of etp has received
  std::vector<int64_t> tokens_per_expert_;
};

}  // namespace megatron_cpp
