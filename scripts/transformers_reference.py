#!/usr/bin/env python3
"""Makes and runs small Step3.7 models with Hugging Face transformers (5.23 or later), to compare this project with them.

  transformers_reference.py make CONFIG.json MODEL_DIR [--seed N]
      a random model of this configuration (hub form), in the published layout; with weights for the announced
      multi-token-prediction layers, which transformers doesn't load
  transformers_reference.py input MODEL_DIR INPUT.safetensors [--seed N] [--batch B] [--length S] [--images N]
      random ids, labels and pictures, an image start token before each picture (--image-start-token)
  transformers_reference.py run MODEL_DIR INPUT.safetensors OUTPUT.safetensors
      loads MODEL_DIR, refuses missing and unexpected tensors, and writes logits, loss and gradients (published names)

Needs torch, transformers and safetensors, in an environment of their own.
"""

import argparse
import json
import pathlib
import re
import shutil
import tempfile

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Step3p7ForConditionalGeneration


def mtp_shapes(text):
    """Name and shape of each tensor of the multi-token-prediction layers, below model.layers.N."""
    hidden, head, ffn = text["hidden_size"], text["head_dim"], text["intermediate_size"]
    first = text["num_hidden_layers"]
    for layer in range(first, first + text.get("num_nextn_predict_layers", 0)):
        sliding = text["layer_types"][layer] == "sliding_attention"
        heads = (text["attention_other_setting"] if sliding else text)["num_attention_heads"]
        groups = text["num_attention_groups"]
        for name, shape in {
            "enorm": [hidden],
            "hnorm": [hidden],
            "eh_proj": [hidden, 2 * hidden],
            "transformer.shared_head.norm": [hidden],
            "transformer.shared_head.output": [text["vocab_size"], hidden],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [heads * head, hidden],
            "self_attn.k_proj": [groups * head, hidden],
            "self_attn.v_proj": [groups * head, hidden],
            "self_attn.o_proj": [hidden, heads * head],
            "self_attn.g_proj": [heads, hidden],
            "self_attn.q_norm": [head],
            "self_attn.k_norm": [head],
            "mlp.gate_proj": [ffn, hidden],
            "mlp.up_proj": [ffn, hidden],
            "mlp.down_proj": [hidden, ffn],
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape


def published(model):
    """The values of the model's parameters by their published names."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(pathlib.Path(folder) / "model.safetensors")


def make(arguments):
    config_json = json.loads(pathlib.Path(arguments.config).read_text())
    torch.manual_seed(arguments.seed)
    folder = pathlib.Path(arguments.model)
    folder.mkdir(parents=True)
    shutil.copy(arguments.config, folder / "config.json")
    model = Step3p7ForConditionalGeneration(AutoConfig.from_pretrained(folder)).float()
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or "inv_freq" in name:
                continue
            is_norm = value.dim() == 1 and "norm" in name
            value.copy_(torch.randn_like(value) * (0.2 if value.dim() == 1 else value[0].numel() ** -0.5))
            if is_norm and "vision" in name and name.endswith("weight"):
                value.add_(1.0)
    tensors = published(model)
    for name, shape in mtp_shapes(config_json["text_config"]):
        tensors[name] = torch.randn(shape) * shape[-1] ** -0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def make_input(arguments):
    config = json.loads((pathlib.Path(arguments.model) / "config.json").read_text())
    vision, placeholder = config["vision_config"], config["image_token_id"]
    generator = torch.Generator().manual_seed(arguments.seed)
    side = vision["image_size"]
    rows = ((side // vision["patch_size"] + 3) // 4) ** 2
    special = {placeholder, arguments.image_start_token, 1}
    words = [i for i in range(config["text_config"]["vocab_size"]) if i not in special]
    draw = torch.randint(len(words), [arguments.batch, arguments.length], generator=generator)
    ids = torch.tensor(words)[draw]
    tensors = {}
    if arguments.images:
        for image in range(arguments.images):
            begin = 2 + (image // arguments.batch) * (rows + 3)
            row = ids[image % arguments.batch]
            row[begin] = arguments.image_start_token
            row[begin + 1 : begin + 1 + rows] = placeholder
        tensors["pixel_values"] = torch.randn([arguments.images, 3, side, side], generator=generator)
    labels = ids.clone()
    labels[ids == placeholder] = -100
    labels[:, :2] = -100
    save_file({"input_ids": ids, "labels": labels, **tensors}, arguments.input)


def run(arguments):
    model, info = Step3p7ForConditionalGeneration.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    announced = model.config.text_config.num_hidden_layers
    is_mtp = lambda name: (found := re.search(r"layers\.(\d+)\.", name)) and int(found[1]) >= announced
    wrong = {
        "missing": info["missing_keys"],
        "unexpected": [name for name in info["unexpected_keys"] if not is_mtp(name)],
        "mismatched": info["mismatched_keys"],
    }
    for kind, names in wrong.items():
        if names:
            raise SystemExit(f"{arguments.model}: {kind} tensors: {sorted(map(str, names))}")
    tensors = load_file(arguments.input)
    known = ["input_ids", "pixel_values", "pixel_values_local", "num_local_patches", "labels"]
    model.train(False)
    result = model(**{name: tensors[name] for name in known if name in tensors})
    output = {"logits": result.logits.detach().contiguous()}
    if "labels" in tensors:
        output["loss"] = result.loss.detach()
        result.loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        gradients = published(model)
        output.update({f"grad.{name}": value for name, value in gradients.items() if "router_bias" not in name})
    save_file(output, arguments.output)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("make")
    command.add_argument("config")
    command.add_argument("model")
    command.add_argument("--seed", type=int, default=1)
    command.set_defaults(function=make)
    command = commands.add_parser("input")
    command.add_argument("model")
    command.add_argument("input")
    for name, value in {"seed": 2, "batch": 2, "length": 24, "images": 2, "image-start-token": 2}.items():
        command.add_argument(f"--{name}", type=int, default=value)
    command.set_defaults(function=make_input)
    command = commands.add_parser("run")
    command.add_argument("model")
    command.add_argument("input")
    command.add_argument("output")
    command.set_defaults(function=run)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
