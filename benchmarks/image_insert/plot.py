#!/usr/bin/env python3
"""Draws what benchmark_image_insert printed: step time and bytes over tensor-parallel size and sequence length.

    python3 benchmarks/image_insert/plot.py FILE.jsonl... --output docs/figures

Writes image_insert_time.svg, from the lines that timed a way, and image_insert_bytes.svg, from those and the rehearsed
ones. Needs matplotlib (Debian: python3-matplotlib).
"""
import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as pyplot

# What a figure shows, in this order, always in the same colour: (way, projector sharding), label, colour.
WAYS = [
    (("public", "replicated"), "public", "#b03a2e"),
    (("all_gather", "column"), "all-gather, column", "#b9770e"),
    (("fused_vocab", "column"), "fused vocab, column", "#1f618d"),
    (("fused_vocab", "replicated"), "fused vocab, replicated", "#5dade2"),
    (("fused_hidden", "column"), "fused hidden, column", "#196f3d"),
    (("text_only", ""), "text alone", "#7f8c8d"),
]


def read(paths):
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line.startswith("{")]
    timed = [line for line in lines if "step_ms" in line]
    volumes = [line for line in lines if line.get("rehearsal") == "volume"]
    return timed, volumes


def key(line):
    return line["way"], line["projector_sharding"]


def plot_times(timed, output):
    dtypes = sorted({line["dtype"] for line in timed}, reverse=True)
    settings = sorted({(line["tp"], line["sequence"]) for line in timed})
    figure, axes = pyplot.subplots(1, len(dtypes), figsize=(5.2 * len(dtypes), 3.6), squeeze=False)
    for axis, dtype in zip(axes[0], dtypes):
        for index, (way, label, colour) in enumerate(WAYS):
            for position, (tp, sequence) in enumerate(settings):
                found = [line for line in timed if key(line) == way and line["features"] == "frozen"
                         and (line["dtype"], line["tp"], line["sequence"]) == (dtype, tp, sequence)]
                if found:
                    axis.bar(position + (index - 2.5) * 0.13, found[0]["step_ms"]["median"] / 1000, 0.12, color=colour,
                             label=label if position == 0 else None)
        axis.set_xticks(range(len(settings)), [f"tp {tp}\nS {sequence}" for tp, sequence in settings])
        axis.set_title(f"{dtype}, features frozen", fontsize=10)
        axis.set_ylabel("forward and backward, s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(output / "image_insert_time.svg", metadata={"Date": None})


def plot_bytes(timed, volumes, output):
    figure, (over_tp, over_sequence) = pyplot.subplots(1, 2, figsize=(10.4, 3.6))
    for way, label, colour in WAYS:
        points = sorted((line["tp"], line["bytes_per_rank"] / 1e6) for line in volumes
                        if key(line) == way and line["features"] == "frozen")
        if points:
            over_tp.plot(*zip(*points), marker="o", markersize=3, color=colour, label=label)
        points = sorted((line["sequence"], line["bytes_per_rank"] / 1e6) for line in timed
                        if key(line) == way and line["features"] == "frozen" and line["dtype"] == "float32"
                        and line["tp"] == 2)
        if points:
            over_sequence.plot(*zip(*points), marker="o", markersize=3, color=colour, label=label)
    over_tp.set_xscale("log", base=2)
    over_tp.set_yscale("log")
    over_tp.set_xlabel("tensor-parallel size")
    over_tp.set_title("S = 8192, float32, rehearsed", fontsize=10)
    over_sequence.set_xlabel("S")
    over_sequence.set_title("tp 2, float32, counted", fontsize=10)
    for axis in (over_tp, over_sequence):
        axis.set_ylabel("MB sent per rank and step")
        axis.spines[["top", "right"]].set_visible(False)
    over_tp.legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(output / "image_insert_bytes.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/figures"))
    arguments = parser.parse_args()
    matplotlib.rcParams.update({"svg.hashsalt": "image_insert", "svg.fonttype": "none"})  # the same lines, the same file
    timed, volumes = read(arguments.files)
    if not timed:
        raise SystemExit(f"no timed way in {', '.join(map(str, arguments.files))}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    plot_times(timed, arguments.output)
    plot_bytes(timed, volumes, arguments.output)


if __name__ == "__main__":
    main()
