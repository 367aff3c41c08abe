// (b) ProcessGroupNCCL as LibTorch has it, one rank, each collective once; and what CUDA says about the machine. The
// only file of gpu_check that includes CUDA's headers.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <chrono>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "benchmarks/gpu_check/check.h"
#include "parallel/agree.h"

#ifdef USE_C10D_NCCL

#include <c10/cuda/CUDAGuard.h>
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

// Of ATen/cuda/CUDAContextLight.h, which includes headers of cuBLAS, cuSPARSE and cuSOLVER that need not be there.
namespace at::cuda {
cudaDeviceProp* getDeviceProperties(c10::DeviceIndex device);
}  // namespace at::cuda

namespace megatron_cpp::gpu_check {
namespace {

using Work = c10::intrusive_ptr<c10d::Work>;
using Tensors = std::vector<at::Tensor>;

/// "12.4" of 12040 (thousands and tens) or "2.28.9" of 22809 (ten thousands, hundreds, ones).
std::string cuda_version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
std::string nccl_version_text(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

/// Calls the backend as parallel/collectives.cpp does, past the short cuts for groups of one rank.
class Collectives {
 public:
  Collectives(const Target& target, Report& report) : target_(target), report_(report) {
    auto options = c10d::ProcessGroupNCCL::Options::create();
    options->timeout = std::chrono::seconds(30);
    options->group_name = "gpu_check";
    options->global_ranks_in_group = {0};
    backend_ = c10::make_intrusive<c10d::ProcessGroupNCCL>(c10::make_intrusive<c10d::HashStore>(), /*rank=*/0,
                                                           /*size=*/1, std::move(options));
    backend_->setBoundDeviceId(target.device());
    backend_->eagerConnectSingleDevice(target.device());
  }
  ~Collectives() { backend_->shutdown(); }
  Collectives(const Collectives&) = delete;
  Collectives& operator=(const Collectives&) = delete;

  void run() {
    for (const auto dtype : {at::kFloat, at::kBFloat16, at::kDouble, at::kLong}) all(dtype);
    try_it("barrier", [&] {
      const auto work = backend_->barrier();
      if (work) work->wait();
      return true;
    });
  }

 private:
  void all(at::ScalarType dtype) {
    const auto name = [&](const char* operation) { return operation + (" " + std::string(c10::toString(dtype))); };
    const auto input = at::arange(96, at::TensorOptions(at::kFloat).device(target_.device())).to(dtype).view({12, 8});
    for (const bool async : {false, true}) {
      const auto both = [&](const char* operation, const std::function<Work(Tensors&)>& call) {
        // Out of place: in place the tensor itself is the result.
        Tensors tensors{at::zeros_like(input), input.clone()};
        try_it(name(operation) + (async ? ", asynchronous" : ""), [&] {
          const auto work = call(tensors);
          // What wait_for() in parallel/collectives.cpp is there for.
          if (!async) no_work_ = no_work_ && !work;
          if (work) work->wait();
          target_.synchronize();
          return at::equal(tensors[0], input);
        });
      };
      both("all_reduce", [&](Tensors& t) {
        c10d::AllreduceOptions options;
        options.asyncOp = async;
        t[0].copy_(t[1]);
        Tensors in_place{t[0]};
        return backend_->allreduce(in_place, options);
      });
      both("broadcast", [&](Tensors& t) {
        c10d::BroadcastOptions options;
        options.asyncOp = async;
        options.rootRank = 0;
        t[0].copy_(t[1]);
        Tensors in_place{t[0]};
        return backend_->broadcast(in_place, options);
      });
      both("all_gather", [&](Tensors& t) {
        c10d::AllgatherOptions options;
        options.asyncOp = async;
        std::vector<Tensors> outputs{{t[0]}};
        Tensors inputs{t[1]};
        return backend_->allgather(outputs, inputs, options);
      });
      both("all_gather in one tensor", [&](Tensors& t) {
        c10d::AllgatherOptions options;
        options.asyncOp = async;
        return backend_->_allgather_base(t[0], t[1], options);
      });
      both("reduce_scatter in one tensor", [&](Tensors& t) {
        c10d::ReduceScatterOptions options;
        options.asyncOp = async;
        return backend_->_reduce_scatter_base(t[0], t[1], options);
      });
      both("all_to_all, even", [&](Tensors& t) {
        c10d::AllToAllOptions options;
        options.asyncOp = async;
        std::vector<int64_t> none;
        return backend_->alltoall_base(t[0], t[1], none, none, options);
      });
      both("all_to_all, by splits", [&](Tensors& t) {
        c10d::AllToAllOptions options;
        options.asyncOp = async;
        std::vector<int64_t> rows{t[0].size(0)};
        return backend_->alltoall_base(t[0], t[1], rows, rows, options);
      });
    }
    if (dtype == at::kLong) {
      report_.row(
          {{"what", "asyncOp = false returned no Work, as parallel/collectives.cpp expects"}, {"so", no_work_}});
    }
  }

  void try_it(const std::string& what, const std::function<bool()>& action) {
    try {
      report_.verdict({{"what", "NCCL " + what}}, action());
    } catch (const std::exception& error) {
      report_.verdict({{"what", "NCCL " + what}, {"error", parallel::error_text(error)}}, false);
    }
  }

  const Target& target_;
  Report& report_;
  c10::intrusive_ptr<c10d::ProcessGroupNCCL> backend_;
  bool no_work_ = true;
};

}  // namespace

void check_collectives(const Target& target, Report& report) {
  if (!target.is_gpu()) {
    report.no_gpu("ProcessGroupNCCL of one rank");
    return;
  }
  const c10::cuda::CUDAGuard guard(target.device());
  Collectives(target, report).run();
}

nlohmann::ordered_json cuda_facts() {
  nlohmann::ordered_json facts;
  int version = 0;
  if (cudaRuntimeGetVersion(&version) == cudaSuccess) facts["cuda_runtime"] = cuda_version_text(version);
  if (ncclGetVersion(&version) == ncclSuccess) {
    facts["nccl"] = nccl_version_text(version);
    // From 2.30 on NCCL lets ranks share a GPU where NCCL_MULTI_RANK_GPU_ENABLE=1.
    facts["nccl_shares_gpus"] = version >= 23000;
  }
  if (!at::hasCUDA()) return facts;
  if (cudaDriverGetVersion(&version) == cudaSuccess) facts["cuda_driver"] = cuda_version_text(version);
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) facts["gpus"] = count;
  const auto* properties = at::cuda::getDeviceProperties(0);
  facts["gpu"] = std::string(&properties->name[0]);
  facts["compute_capability"] = std::to_string(properties->major) + "." + std::to_string(properties->minor);
  facts["multiprocessors"] = properties->multiProcessorCount;
  facts["gpu_GiB"] = static_cast<double>(properties->totalGlobalMem) / (1 << 30);
  return facts;
}

}  // namespace megatron_cpp::gpu_check

#else

namespace megatron_cpp::gpu_check {

void check_collectives(const Target& /*target*/, Report& report) {
  report.row({{"what", "ProcessGroupNCCL of one rank"}, {"no_gpu", true}, {"why", "this build has no NCCL"}});
}

nlohmann::ordered_json cuda_facts() { return nlohmann::ordered_json::object(); }

}  // namespace megatron_cpp::gpu_check

#endif
