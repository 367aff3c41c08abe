#!/usr/bin/env python3
"""What step37 writes loads in Hugging Face transformers, strictly, and gives the same logits, loss and gradients.

  transformers_test.py STEP37 CASES_DIR SCRATCH_DIR

Registered where the environment is found when the build is configured (MCPP_TRANSFORMERS_PYTHON)."""

import pathlib
import shutil
import subprocess
import sys

from safetensors.torch import load_file

TOLERANCE = 1e-4  # of the largest element
NAME, IMAGE_START = "wide", "2"


def run(*command):
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True)


def difference(actual, expected):
    largest = expected.abs().max().item()
    return (actual.double() - expected.double()).abs().max().item() / max(largest, 1e-30)


def main():
    step37, cases, scratch = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    case = cases / "forward" / f"{NAME}.safetensors"
    run(step37, "convert", "--from", cases / "models" / NAME, "--to", scratch / "run")
    run(step37, "convert", "--from", scratch / "run", "--to", scratch / "exported", "--max-shard-size", "100KB")
    reference = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "transformers_reference.py"
    run(sys.executable, "-B", reference, "run", scratch / "exported", case, scratch / "expected.safetensors")
    run(step37, "forward", "--model", scratch / "exported", "--input", case, "--output", scratch / "actual.safetensors",
        "--image-start-token", IMAGE_START, "--gradients")
    actual = load_file(scratch / "actual.safetensors")
    expected = load_file(scratch / "expected.safetensors")
    assert len(expected) > 50
    differences = {name: difference(actual[name], tensor) for name, tensor in expected.items()}
    worst = max(differences, key=differences.get)
    print(f"{len(expected)} tensors, largest difference {differences[worst]:.1e} of the largest element, in {worst}")
    sys.exit(differences[worst] > TOLERANCE)


if __name__ == "__main__":
    main()
