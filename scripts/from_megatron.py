#!/usr/bin/env python3
"""Turns a checkpoint that Megatron-Bridge's Step3.7 model saved (Megatron's torch_dist format) into a published folder.

  from_megatron.py ITERATION_FOLDER CONFIG.json MODEL_DIR [--tokenizer tokenizer.model] [--weights-only]
                   [--first-gate-rows]

ITERATION_FOLDER (iter_0000100) has .metadata, common.pt and *.distcp; CONFIG.json is config.json of the published model
in the hub form. MODEL_DIR gets config.json, model.safetensors (the main parameters, in float32) and
optimizer.safetensors (AdamW's moments and step), of which

  step37 convert --from MODEL_DIR --to RUN_DIRECTORY --config RUN.yaml

makes a training checkpoint, to go on from. Needs torch; Megatron isn't needed.
"""

import argparse
import collections
import ctypes
import dataclasses
import json
import math
import pathlib
import pickle
import re
import shutil
import struct
import types
import typing
import warnings

for message in ("Failed to initialize NumPy", "torch.distributed is disabled"):  # neither is needed
    warnings.filterwarnings("ignore", message=message)
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

MOST_LISTED = 20
MOMENTS = ("exp_avg", "exp_avg_sq")
# What the optimizer's state of a parameter is called, by its kind and Megatron's version.
ROLES = {"param": "parameter", "fp32_param": "parameter", **{moment: moment for moment in MOMENTS}}


class Refused(Exception):
    """What is wrong with the input, in a sentence."""


class Model:
    """Sizes of the model, from config.json in the hub form."""

    def __init__(self, config):
        try:
            text, vision = config["text_config"], config["vision_config"]
            self.vocabulary_size = text["vocab_size"]
            self.hidden_size = text["hidden_size"]
            self.ffn_size = text["intermediate_size"]
            self.num_layers = text["num_hidden_layers"]
            self.num_mtp_layers = text.get("num_nextn_predict_layers", 0)
            self.head_dim = text["head_dim"]
            self.groups = text["num_attention_groups"]
            self.layer_types = text["layer_types"]
            self.full_heads = text["num_attention_heads"]
            self.sliding_heads = text["attention_other_setting"]["num_attention_heads"]
            enumerated = text["moe_layers_enum"]
            numbers = enumerated.split(",") if isinstance(enumerated, str) else enumerated
            self.expert_layers = {int(number) for number in numbers if str(number).strip()}
            if self.expert_layers:
                self.num_experts = text["moe_num_experts"]
                self.expert_size = text["moe_intermediate_size"]
                self.shared_expert_size = text["share_expert_dim"]
            self.projector_bias = config.get("projector_bias", False)
            self.vision_width = vision["width"]
            self.vision_layers = vision["layers"]
            self.vision_mlp_width = int(vision["width"] * vision["mlp_ratio"])
            self.patch_size = vision["patch_size"]
            self.patches = (vision["image_size"] // vision["patch_size"]) ** 2
            named = len(self.layer_types)
            if named < self.num_layers + self.num_mtp_layers:
                raise Refused(f"config.json has {named} layer_types, fewer than layers")
        except KeyError as error:
            raise Refused(f"config.json has no {error.args[0]}: it has to be in the hub form, as released") from None

    def heads(self, index):
        return self.sliding_heads if self.layer_types[index] == "sliding_attention" else self.full_heads

    def has_experts(self, index):
        return index in self.expert_layers

    def qkv_rows(self, index, elementwise_gate):
        """Rows of the fused matrix; an elementwise gate has as many as the queries, another one for each head."""
        heads = self.heads(index)
        gate_rows = heads * self.head_dim if elementwise_gate else heads
        return (heads + 2 * self.groups) * self.head_dim + gate_rows


@dataclasses.dataclass
class Source:
    """A tensor of Megatron's model and what it becomes."""

    shapes: list  # that it may have
    parts: dict  # published name -> shape
    split: typing.Callable = lambda tensor: [tensor]  # into the parts, in their order
    has_padding: bool = False  # rows may follow that no token has

    def accepts(self, shape):
        return any(
            shape == expected or (self.has_padding and shape[1:] == expected[1:] and shape[0] >= expected[0])
            for expected in self.shapes
        )


def split_qkv(tensor, heads, groups, head_dim, first_gate_rows):
    """Queries, keys, values and gates of a fused matrix. For each group it has the rows of its queries, key and value,
    and behind all groups a row for each head's gate; or, with elementwise gates, a head's gate head_dim times behind
    the group's queries."""
    of_group = heads // groups
    is_elementwise = len(tensor) == 2 * (heads + groups) * head_dim
    if is_elementwise:
        grouped, gates = tensor.reshape(groups, (2 * of_group + 2) * head_dim, -1), None
    else:
        grouped = tensor[:-heads].reshape(groups, (of_group + 2) * head_dim, -1)
        gates = tensor[-heads:]
    sizes = [of_group * head_dim] * (2 if is_elementwise else 1) + [head_dim] * 2
    queries, *elementwise, key, value = grouped.split(sizes, dim=1)
    if is_elementwise:
        rows = elementwise[0].reshape(heads, head_dim, -1)
        if not first_gate_rows and not torch.equal(rows, rows[:, :1].expand_as(rows)):
            raise Refused(
                "has a gate for each element (attention_output_gate) that differs between elements of a head, which the "
                "published model can't have: --first-gate-rows takes each head's first row, as Megatron-Bridge exports"
            )
        gates = rows[:, 0]
    return [part.reshape(-1, tensor.shape[-1]) for part in (queries, key, value, gates)]


def sources(model, first_gate_rows=False, has_qk_norms=True):
    """Megatron's name -> Source, of all tensors of the model."""
    result = {}
    hidden = model.hidden_size

    def same(theirs, ours, *shape, has_padding=False):
        split = (lambda tensor: [tensor[: shape[0]]]) if has_padding else (lambda tensor: [tensor])
        result[theirs] = Source([shape], {ours: shape}, split, has_padding)

    def feed_forward(theirs, ours, size, *experts):
        """Gate and up are one matrix, one behind the other; `experts`: their number, if they are stacked."""
        parts = {f"{ours}.{part}_proj.weight": (*experts, size, hidden) for part in ("gate", "up")}
        both = (*experts, 2 * size, hidden)
        result[f"{theirs}.linear_fc1.weight"] = Source([both], parts, lambda tensor: tensor.chunk(2, dim=-2))
        same(f"{theirs}.linear_fc2.weight", f"{ours}.down_proj.weight", *experts, hidden, size)

    def layer(theirs, ours, index):
        heads, groups, dim = model.heads(index), model.groups, model.head_dim
        same(f"{theirs}.input_layernorm.weight", f"{ours}.input_layernorm.weight", hidden)
        same(f"{theirs}.pre_mlp_layernorm.weight", f"{ours}.post_attention_layernorm.weight", hidden)
        if has_qk_norms:
            same(f"{theirs}.self_attention.q_layernorm.weight", f"{ours}.self_attn.q_norm.weight", dim)
            same(f"{theirs}.self_attention.k_layernorm.weight", f"{ours}.self_attn.k_norm.weight", dim)
        same(f"{theirs}.self_attention.linear_proj.weight", f"{ours}.self_attn.o_proj.weight", hidden, heads * dim)
        rows = {"q": heads * dim, "k": groups * dim, "v": groups * dim, "g": heads}
        result[f"{theirs}.self_attention.linear_qkv.weight"] = Source(
            [(model.qkv_rows(index, is_elementwise), hidden) for is_elementwise in (False, True)],
            {f"{ours}.self_attn.{part}_proj.weight": (count, hidden) for part, count in rows.items()},
            lambda tensor: split_qkv(tensor, heads, groups, dim, first_gate_rows),
        )
        if not model.has_experts(index):
            return feed_forward(f"{theirs}.mlp", f"{ours}.mlp", model.ffn_size)
        same(f"{theirs}.mlp.router.weight", f"{ours}.moe.gate.weight", model.num_experts, hidden)
        same(f"{theirs}.mlp.router.expert_bias", f"{ours}.moe.router_bias", model.num_experts)
        feed_forward(f"{theirs}.mlp.experts.experts", f"{ours}.moe", model.expert_size, model.num_experts)
        if model.shared_expert_size > 0:
            feed_forward(f"{theirs}.mlp.shared_experts", f"{ours}.share_expert", model.shared_expert_size)

    language, vocabulary = "language_model", (model.vocabulary_size, hidden)
    same(f"{language}.embedding.word_embeddings.weight", "model.embed_tokens.weight", *vocabulary, has_padding=True)
    same(f"{language}.decoder.final_layernorm.weight", "model.norm.weight", hidden)
    for index in range(model.num_layers):
        layer(f"{language}.decoder.layers.{index}", f"model.layers.{index}", index)
    heads_of_mtp = []
    for depth in range(model.num_mtp_layers):
        theirs, ours = f"{language}.mtp.layers.{depth}", f"model.layers.{model.num_layers + depth}"
        same(f"{theirs}.enorm.weight", f"{ours}.enorm.weight", hidden)
        same(f"{theirs}.hnorm.weight", f"{ours}.hnorm.weight", hidden)
        same(f"{theirs}.eh_proj.weight", f"{ours}.eh_proj.weight", hidden, 2 * hidden)
        same(f"{theirs}.final_layernorm.weight", f"{ours}.transformer.shared_head.norm.weight", hidden)
        layer(f"{theirs}.transformer_layer", ours, model.num_layers + depth)
        heads_of_mtp.append(f"{ours}.transformer.shared_head.output.weight")
    # Megatron's multi-token-prediction layers have no output matrices of their own: they share the model's.
    outputs = ["lm_head.weight", *heads_of_mtp]
    result[f"{language}.output_layer.weight"] = Source(
        [vocabulary],
        dict.fromkeys(outputs, vocabulary),
        lambda tensor: [tensor[: vocabulary[0]]] * len(outputs),
        has_padding=True,
    )

    def weight_and_bias(theirs, ours, *shape):
        same(f"{theirs}.weight", f"{ours}.weight", *shape)
        same(f"{theirs}.bias", f"{ours}.bias", shape[0])

    width, mlp_width = model.vision_width, model.vision_mlp_width
    vision = {
        "conv1.weight": (width, 3, model.patch_size, model.patch_size),
        "positional_embedding": (model.patches, width),
    }
    with_bias = {"ln_pre": (width,), "vit_downsampler1": (2 * width, width, 3, 3)}
    with_bias["vit_downsampler2"] = (4 * width, 2 * width, 3, 3)
    for number in range(model.vision_layers):
        block = f"transformer.resblocks.{number}"
        vision[f"{block}.attn.in_proj_weight"] = (3 * width, width)
        vision[f"{block}.attn.in_proj_bias"] = (3 * width,)
        vision[f"{block}.ls_1.gamma"] = vision[f"{block}.ls_2.gamma"] = (width,)
        with_bias[f"{block}.ln_1"] = with_bias[f"{block}.ln_2"] = (width,)
        with_bias[f"{block}.attn.out_proj"] = (width, width)
        with_bias[f"{block}.mlp.c_fc"] = (mlp_width, width)
        with_bias[f"{block}.mlp.c_proj"] = (width, mlp_width)
    for name, shape in vision.items():
        same(f"vision_model.{name}", f"vision_model.{name}", *shape)
    for name, shape in with_bias.items():
        weight_and_bias(f"vision_model.{name}", f"vision_model.{name}", *shape)
    projector = "image_insert_embedding.align_projector", "vit_large_projector"
    if model.projector_bias:
        weight_and_bias(*projector, hidden, 4 * width)
    else:
        same(f"{projector[0]}.weight", f"{projector[1]}.weight", hidden, 4 * width)
    return result


def published_shapes(model):
    """Published name -> shape."""
    return {name: shape for source in sources(model).values() for name, shape in source.parts.items()}


class Unknown:
    """In place of an object of a class that isn't made: nothing that common.pt names is run."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class PlainUnpickler(pickle.Unpickler):
    """Makes containers, numbers and tensors. The settings of a run have classes of Megatron, too."""

    KNOWN = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("argparse", "Namespace"): argparse.Namespace,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    }

    def find_class(self, module, name):
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        return self.KNOWN.get((module, name), Unknown)


class Checkpoint:
    """A folder in Megatron's torch_dist format."""

    def __init__(self, folder):
        self.folder = folder
        for name in (".metadata", "common.pt", "metadata.json"):
            if not (folder / name).is_file():
                raise Refused(f"{folder} has no {name}: give the folder of one iteration, such as iter_0000100")
        backend = json.loads((folder / "metadata.json").read_text()).get("sharded_backend")
        if backend != "torch_dist":
            raise Refused(f"{folder} is in the format {backend}: save with --ckpt-format torch_dist")
        reader = dcp.FileSystemReader(folder)
        try:
            metadata = reader.read_metadata()
        except Exception as error:  # of many kinds: it is a pickle
            raise Refused(
                f"{folder}/.metadata can't be read by torch {torch.__version__}: {error!r}; it takes the torch that "
                "saved it, or a newer one"
            ) from None
        reader.read_metadata = lambda *args, **kwargs: metadata  # once, not for each tensor
        self.reader = reader
        entries = metadata.state_dict_metadata
        self.entries = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
        self.objects = [key for key in entries if key not in self.entries]
        plain = types.SimpleNamespace(Unpickler=PlainUnpickler, load=None, __name__="plain")
        self.common = torch.load(folder / "common.pt", map_location="cpu", weights_only=False, pickle_module=plain)

    def read(self, key):
        entry = self.entries[key]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        try:
            dcp.load({key: tensor}, storage_reader=self.reader, no_dist=True)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise Refused(f"{self.folder}: {key} can't be read: {reason!r}") from None
        return tensor

    def values_of(self, key):
        """All values of this key in the optimizer's part of common.pt."""

        def search(value):
            if isinstance(value, dict):
                if key in value:
                    yield value[key]
                value = list(value.values())
            if isinstance(value, (list, tuple)):
                for part in value:
                    yield from search(part)

        return list(search(self.common.get("optimizer")))

    def check_optimizer(self):
        """Refuses layouts that are those of the ranks which wrote them."""
        layouts = [key for key in [*self.entries, *self.objects] if "optimizer.distributed.dp_group_idx" in key]
        layouts += [kind for kind in self.values_of("param_state_sharding_type") if kind != "fully_reshardable"]
        if layouts:
            raise Refused(
                f"{self.folder} has its optimizer in a layout of the ranks that saved it ({layouts[0]}): load it with "
                "Megatron and save with --dist-ckpt-optim-fully-reshardable, or take --weights-only"
            )

    def step(self):
        """How many steps the optimizer has made."""
        found = sorted({int(step) for key in ("step", "common_step") for step in self.values_of(key)})
        if len(found) != 1:
            raise Refused(f"{self.folder / 'common.pt'} has {found or 'no'} steps of the optimizer, not one number")
        return found[0]


@dataclasses.dataclass
class Stored:
    """Where a tensor is: whole, or that of one layer in a tensor of all layers."""

    key: str
    shape: tuple
    layer: typing.Optional[int] = None


def canonical(name):
    """The name without what depends on the implementation of layers."""
    name = name.replace(".self_attention.linear_qkv.layer_norm_weight", ".input_layernorm.weight")
    name = name.replace(".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight")
    return name.replace(".mtp_model_layer.", ".transformer_layer.")


def stored_tensors(checkpoint, with_optimizer):
    """{role: {name: Stored}}; the role of the model's own tensors is "model"."""
    result = {role: {} for role in ("model", *ROLES.values())}
    for key, entry in checkpoint.entries.items():
        name, role = re.sub(r"^chained_\d+\.", "", key), "model"
        if name.startswith("optimizer.") and not with_optimizer:
            continue
        if found := re.match(r"optimizer\.state\.(\w+)\.(.*)", name):
            if found[1] not in ROLES:
                raise Refused(f"{checkpoint.folder}: {key} is no state of AdamW: {', '.join(ROLES)} can be read")
            role, name = ROLES[found[1]], found[2]
        shape = tuple(entry.size)
        if stacked := re.match(r"(.*\.layers)\.(?!\d)(.*)", name):
            for layer in range(shape[0]):
                result[role][canonical(f"{stacked[1]}.{layer}.{stacked[2]}")] = Stored(key, shape[1:], layer)
        else:
            result[role][canonical(name)] = Stored(key, shape)
    return result


def refuse_faults(folder, faults):
    if not faults:
        return
    more = [f"and {len(faults) - MOST_LISTED} more"] if len(faults) > MOST_LISTED else []
    raise Refused("\n  ".join([f"{folder}: the tensors are not those of config.json:", *faults[:MOST_LISTED], *more]))


def plan(checkpoint, model, with_optimizer, first_gate_rows):
    """Checks names and shapes. Returns Megatron's name -> Source, and {role: {name: Stored}} of what is to be read."""
    stored = stored_tensors(checkpoint, with_optimizer)
    has_qk_norms = any(name.endswith("self_attention.q_layernorm.weight") for name in stored["model"])
    expected = sources(model, first_gate_rows, has_qk_norms)
    faults = [f"missing: {name}" for name in expected if name not in stored["model"]]
    for role, tensors in stored.items():
        for name, place in tensors.items():
            if name not in expected:
                faults.append(f"unexpected: {place.key}")
            elif not expected[name].accepts(place.shape):
                shapes = " or ".join(map(str, map(list, expected[name].shapes)))
                faults.append(f"{place.key} has shape {list(place.shape)}, expected {shapes}")
    # The model's own tensors are rounded copies of the main parameters.
    reads = {"parameter": stored["model"]}
    if with_optimizer:
        reads = {"parameter": {**stored["model"], **stored["parameter"]}, **{role: stored[role] for role in MOMENTS}}
        trained = set(stored["exp_avg"]) | set(stored["exp_avg_sq"])
        for name in sorted(trained):
            faults += [f"missing: {role} of {name}" for role in MOMENTS if name not in stored[role]]
            if name not in reads["parameter"]:
                continue  # it is missing
            dtype = checkpoint.entries[reads["parameter"][name].key].properties.dtype
            if dtype != torch.float32:
                faults.append(f"missing: the float32 main parameter of {name}, which is in {dtype}")
        if not trained:
            faults.append("missing: the moments of the optimizer (--weights-only goes without)")
    refuse_faults(checkpoint.folder, faults)
    return expected, reads


class SafetensorsWriter:
    """A file of float32 tensors, which are written in any order."""

    def __init__(self, path, shapes, metadata):
        header, end = {"__metadata__": metadata}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self.header, self.begin = header, 8 + len(text)
        self.file = open(path, "wb")
        self.file.write(struct.pack("<Q", len(text)) + text)
        self.file.truncate(self.begin + end)

    def write(self, name, tensor):
        entry = self.header[name]
        assert list(tensor.shape) == entry["shape"], (name, tensor.shape, entry)
        values = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
        self.file.seek(self.begin + entry["data_offsets"][0])
        self.file.write((ctypes.c_char * (4 * values.numel())).from_address(values.data_ptr()))

    def close(self):
        self.file.close()


def convert(arguments):
    try:
        config = json.loads(arguments.config.read_text())
    except (OSError, ValueError) as error:
        raise Refused(f"{arguments.config} can't be read: {error}") from None
    model = Model(config)
    checkpoint = Checkpoint(arguments.iteration)
    with_optimizer = not arguments.weights_only
    if with_optimizer:
        checkpoint.check_optimizer()
    expected, reads = plan(checkpoint, model, with_optimizer, arguments.first_gate_rows)
    step = checkpoint.step() if with_optimizer else 0
    folder = arguments.model
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} exists and is not an empty folder")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for key in ("dtype", "torch_dtype"):
        for section in (config, config["text_config"], config["vision_config"]):
            if key in section:
                section[key] = "float32"
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if arguments.tokenizer:
        shutil.copy(arguments.tokenizer, partial / "tokenizer.model")
    # Each tensor of the checkpoint is read once, though it may be that of all layers.
    by_key = collections.defaultdict(list)
    shapes = {"model": {}, "optimizer": {}}
    for role, tensors in reads.items():
        for name, place in tensors.items():
            by_key[place.key].append((role, name, place.layer))
            for published, shape in expected[name].parts.items():
                if role == "parameter":
                    shapes["model"][published] = shape
                else:
                    shapes["optimizer"][f"{role}/{published}"] = shape
    weights = SafetensorsWriter(partial / "model.safetensors", shapes["model"], {"format": "pt"})
    moments = None
    if with_optimizer:
        metadata = {"format": "pt", "step": str(step)}
        moments = SafetensorsWriter(partial / "optimizer.safetensors", shapes["optimizer"], metadata)
    for key, uses in by_key.items():
        whole = checkpoint.read(key)
        for role, name, layer in uses:
            try:
                parts = expected[name].split(whole if layer is None else whole[layer])
            except Refused as error:
                raise Refused(f"{arguments.iteration}: {key} {error}") from None
            for published, part in zip(expected[name].parts, parts):
                if role == "parameter":
                    weights.write(published, part)
                else:
                    moments.write(f"{role}/{published}", part)
    for writer in filter(None, (weights, moments)):
        writer.close()
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    after = f", and moments after {step} steps" if with_optimizer else ""
    print(f"{folder}: {len(shapes['model'])} tensors{after}")
    if with_optimizer and checkpoint.common.get("iteration", step) != step:
        print(f"The optimizer's {step} steps count, not Megatron's iteration {checkpoint.common['iteration']}.")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("iteration", type=pathlib.Path, metavar="ITERATION_FOLDER")
    parser.add_argument("config", type=pathlib.Path, metavar="CONFIG.json")
    parser.add_argument("model", type=pathlib.Path, metavar="MODEL_DIR")
    parser.add_argument("--tokenizer", type=pathlib.Path, help="tokenizer.model, copied into MODEL_DIR")
    parser.add_argument("--weights-only", action="store_true", help="without the optimizer, in any layout of it")
    parser.add_argument("--first-gate-rows", action="store_true", help="of elementwise gates, as Megatron-Bridge does")
    try:
        convert(parser.parse_args(arguments))
    except Refused as error:
        raise SystemExit(f"from_megatron.py: {error}")


if __name__ == "__main__":
    main()
