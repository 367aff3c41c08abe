#!/usr/bin/env python3
"""How long Gloo's collectives take: what benchmark_collectives prints of ours, for PyTorch's backend on the CPU.

    python benchmarks/gloo_collectives.py --ranks 2 [--repetitions 30] [--bytes 33554432 ...]

Needs a Python with PyTorch. Starts its ranks itself and prints a JSON object a line: first the machine, then one per
operation, dtype and size. What Gloo hasn't got is left out and named on stderr.
"""
import argparse
import json
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing

WARM_UP = 3


def cpu_model():
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "unknown"


def operations(ranks, dtype, num_bytes):
    """Name -> function, on `num_bytes` of each rank: what it passes in, or, of an all-gather, what it gets."""
    share = num_bytes // dtype.itemsize // ranks
    full, other, part = (torch.ones(n, dtype=dtype) for n in (ranks * share, ranks * share, share))
    return {
        "memcpy": lambda: other.copy_(full),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, full),
        "all_reduce": lambda: dist.all_reduce(other),
        "all_gather": lambda: dist.all_gather_into_tensor(other, part),
        "all_to_all": lambda: dist.all_to_all_single(other, full),
        "broadcast": lambda: dist.broadcast(other, 0),
    }


def supported(functions, rank):
    """Those that run; all ranks find the same."""
    result = {}
    for name, function in functions.items():
        try:
            function()
            result[name] = function
        except RuntimeError as error:
            if rank == 0:
                print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return result


def measure(functions, repetitions):
    """Milliseconds of the slowest rank, [operations, repetitions]. The operations take turns."""
    times = torch.zeros(len(functions), repetitions, dtype=torch.float64)
    for repetition in range(-WARM_UP, repetitions):
        for i, function in enumerate(functions.values()):
            dist.barrier()
            start = time.perf_counter()
            function()
            if repetition >= 0:
                times[i, repetition] = (time.perf_counter() - start) * 1e3
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times


def run(rank, arguments, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=arguments.ranks)
    if rank == 0:
        print(json.dumps({"cpu": cpu_model(), "ranks": arguments.ranks, "threads": torch.get_num_threads()}))
    for dtype in (torch.float32, torch.bfloat16):
        for num_bytes in arguments.bytes:
            functions = supported(operations(arguments.ranks, dtype, num_bytes), rank)
            times = measure(functions, arguments.repetitions)
            if rank != 0:
                continue
            medians = times.median(dim=1).values
            for i, name in enumerate(functions):
                print(json.dumps({
                    "operation": name, "dtype": str(dtype).removeprefix("torch."), "bytes": num_bytes,
                    "milliseconds": {"min": times[i].min().item(), "median": medians[i].item()},
                    "ratio_to_memcpy": (medians[i] / medians[0]).item()}), flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--bytes", type=int, nargs="+", default=[1 << 12, 1 << 18, 1 << 22, 1 << 25])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (arguments, f"{folder}/store"), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
