#!/usr/bin/env python3
"""scripts/from_megatron.py gives what tests/cases/megatron was made of, and a run goes on from it.

  from_megatron_test.py STEP37 SCRATCH_DIR

Registered where torch is found beside the LibTorch of the build (MCPP_TORCH_PYTHON)."""

import hashlib
import json
import pathlib
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib

TESTS = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = TESTS.parent / "scripts" / "from_megatron.py"
CASES = TESTS / "cases" / "megatron"
STEP = 7

sys.path.insert(0, str(SCRIPT.parent))
import from_megatron  # noqa: E402
import torch  # noqa: E402


def run(*command, succeeds=True):
    print("+", *command, flush=True)
    words = [str(word) for word in command]
    result = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, flush=True)
    assert (result.returncode == 0) == succeeds, result.returncode
    return result.stdout


def convert(*arguments):
    """The script, in this process: torch takes seconds to load."""
    print("+ from_megatron.py", *arguments, flush=True)
    from_megatron.main([str(argument) for argument in arguments])


def refusal(*arguments):
    try:
        convert(*arguments)
    except SystemExit as stopped:
        print(stopped, flush=True)
        return str(stopped)
    raise AssertionError("nothing was refused")


def hashes(file):
    """Of the bytes of each tensor in a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    assert all(entry["dtype"] == "F32" for entry in header.values())
    return {key: hashlib.sha256(values[slice(*entry["data_offsets"])]).hexdigest() for key, entry in header.items()}


def hashes_of_checkpoint(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == STEP
    files = {file: hashes(folder / file) for file in manifest["files"]}
    result = {}
    for tensor in manifest["tensors"]:
        (piece,) = tensor["pieces"]
        result[f"{tensor['role']}/{tensor['name']}"] = files[piece["file"]][piece["key"]]
    return result


def test_values(scratch, expected):
    for name in ("head_gates", "element_gates"):
        convert(scratch / name / f"iter_{STEP:07}", CASES / "config.json", scratch / f"model_{name}")
        weights = hashes(scratch / f"model_{name}/model.safetensors")
        moments = hashes(scratch / f"model_{name}/optimizer.safetensors")
        assert {f"parameter/{key}": value for key, value in weights.items()} | moments == expected, name


def test_weights_only(scratch):
    out = scratch / "weights_only"
    convert(scratch / "head_gates" / f"iter_{STEP:07}", CASES / "config.json", out, "--weights-only")
    assert sorted(file.name for file in out.iterdir()) == ["config.json", "model.safetensors"]
    assert hashes(out / "model.safetensors").keys() == hashes(scratch / "model_head_gates/model.safetensors").keys()
    # Its values aren't in the case; that they can be read is seen before.
    divided = from_megatron.Checkpoint(scratch / "dp_reshardable" / f"iter_{STEP:07}")
    model = from_megatron.Model(json.loads((CASES / "config.json").read_text()))
    reads = from_megatron.plan(divided, model, False, False)[1]
    assert list(reads) == ["parameter"] and len(reads["parameter"]) > 50


def test_gates():
    heads, groups, dim, hidden = 4, 2, 3, 5
    fused = torch.randn(2 * (heads + groups) * dim, hidden)
    try:
        from_megatron.split_qkv(fused, heads, groups, dim, False)
        raise AssertionError("gates that differ within a head were taken")
    except from_megatron.Refused as refused:
        assert "--first-gate-rows" in str(refused)
    gates = from_megatron.split_qkv(fused, heads, groups, dim, True)[3]
    rows = fused.reshape(groups, -1, hidden)[:, 2 * dim : 4 * dim].reshape(heads, dim, hidden)
    assert torch.equal(gates, rows[:, 0])


def test_refused(scratch):
    good = scratch / "head_gates" / f"iter_{STEP:07}"
    out = scratch / "refused"
    text = refusal(scratch / "dp_reshardable" / f"iter_{STEP:07}", CASES / "config.json", out)
    assert "save with --dist-ckpt-optim-fully-reshardable" in text

    def with_config(change):
        config = json.loads((CASES / "config.json").read_text())
        change(config)
        (scratch / "config.json").write_text(json.dumps(config))
        assert not out.exists()
        return refusal(good, scratch / "config.json", out)

    text = with_config(lambda config: config["text_config"].update(intermediate_size=32))
    assert "language_model.decoder.layers.1.mlp.linear_fc1.weight has shape [48, 16], expected [64, 16]" in text
    text = with_config(lambda config: config["text_config"].update(num_nextn_predict_layers=0))
    assert "unexpected: language_model.mtp.layers.0.enorm.weight" in text
    text = with_config(lambda config: config["vision_config"].update(layers=2))
    assert "missing: vision_model.transformer.resblocks.1.ln_1.weight" in text
    text = with_config(lambda config: config["text_config"].pop("head_dim"))
    assert "config.json has no head_dim" in text
    text = with_config(lambda config: config["text_config"].update(layer_types=["full_attention"]))
    assert "config.json has 1 layer_types, fewer than layers" in text
    assert "can't be read" in refusal(good, scratch / "none.json", out)
    damaged = scratch / "damaged"
    shutil.copytree(good, damaged)
    for file in damaged.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    assert "can't be read" in refusal(damaged, CASES / "config.json", out)
    assert "has no .metadata" in refusal(scratch, CASES / "config.json", out)
    assert not out.exists()
    text = refusal(good, CASES / "config.json", scratch / "model_head_gates")
    assert "is not an empty folder" in text


def write_picture(path, color):
    """A PNG of one color."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    size = 56
    rows = (b"\0" + bytes(color) * size) * size
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def test_going_on(step37, scratch, expected):
    pictures = scratch / "pictures"
    pictures.mkdir()
    words = ["red duck", "green tree", "blue car", "old house", "small boat", "white cat", "big dog", "round ball"]
    for number, caption in enumerate(words):
        write_picture(pictures / f"{number}.png", (30 * number, 255 - 20 * number, 9 * number))
        (pictures / f"{number}.txt").write_text(caption + "\n")
    model = scratch / "model"
    config = scratch / "run.yaml"
    config.write_text(f"""
data: {{directory: {pictures}, held_out: 0.25, vocabulary_size: 300}}
model: {{from: {model}, mtp_loss_scaling_factor: 0.3}}
training: {{steps: {STEP + 1}, global_batch_size: 2, sequence_length: 128}}
report: {{pictures: 0}}
run: {{device: cpu}}
""")
    # A run's first step gives a tokenizer.
    run(step37, "pretrain", "--config", config, f"run.directory={scratch}/first", "training.steps=1",
        "model.from=", f"model.config={CASES}/config.json")
    tokenizer = scratch / "first" / "tokenizer.model"
    convert(scratch / "head_gates" / f"iter_{STEP:07}", CASES / "config.json", model, "--tokenizer", tokenizer)

    directory = scratch / "run"
    run(step37, "convert", "--from", model, "--to", directory, "--config", config)
    run(step37, "check", "--checkpoint", directory / "checkpoints" / "latest")
    assert hashes_of_checkpoint(directory / "checkpoints" / f"step-{STEP:08}") == expected
    text = run(step37, "pretrain", "--config", config, f"run.directory={directory}")
    assert f"resuming after step {STEP} from" in text
    (line,) = (directory / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == STEP + 1
    manifest = json.loads((directory / "checkpoints" / "latest" / "manifest.json").read_text())
    assert manifest["step"] == STEP + 1

    optimizer = model / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes().replace(b"exp_avg/model.norm.", b"exp_avg/model.nurm."))
    text = run(step37, "convert", "--from", model, "--to", scratch / "wrong", succeeds=False)
    assert "exp_avg/model.nurm.weight is not a moment of a tensor of the model" in text


def main():
    step37, scratch = sys.argv[1], pathlib.Path(sys.argv[2])
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    for archive in CASES.glob("*.tar.xz"):
        with tarfile.open(archive) as files:
            files.extractall(scratch / archive.name.split(".")[0])
    expected = json.loads((CASES / "expected.json").read_text())
    assert len(expected) > 200
    test_values(scratch, expected)
    test_weights_only(scratch)
    test_gates()
    test_refused(scratch)
    test_going_on(step37, scratch, expected)


if __name__ == "__main__":
    main()
