#!/usr/bin/env python3
"""Makes the Megatron checkpoint of tests/cases/megatron with megatron-core (0.16 or later), on the CPU.

  megatron_case.py CONFIG.json FOLDER

CONFIG.json is config.json of the published model that the checkpoint is of. Weights and moments are drawn in the
published layout, laid out as Megatron-Bridge lays them out, and put into a model with a GPTModel and into a
DistributedOptimizer, which write them. FOLDER gets a checkpoint with a gate for each head, one with a gate for each
element, all files but the values of one with the optimizer in the layout dp_reshardable, and expected.json: the SHA-256
of each published tensor in float32.

Needs torch (the oldest that the project supports: an older one can't read what a newer one saves), numpy, psutil and
megatron-core, in an environment of their own.
"""

import argparse
import hashlib
import json
import os
import pathlib
import tarfile
import tempfile
import zlib

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

from from_megatron import Model, published_shapes

STEP = 7


class OnCpu(TorchFunctionMode):
    """Makes on the CPU what megatron-core makes on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def pretend_to_have_a_gpu():
    type_of = torch.Tensor.type
    as_cuda = lambda name: "torch.cuda." + name.split(".")[-1]
    torch.Tensor.type = lambda self, *args: type_of(self, *args) if args else as_cuda(type_of(self))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args: None
    torch.cuda.current_device = lambda: torch.device("cpu")


def drawn(name, shape, role):
    """Values that compress well: of 16, which bfloat16 doesn't have."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{role} {name}".encode()))
    levels = torch.linspace(-0.2, 0.21, 16) if role != "exp_avg_sq" else torch.linspace(0.01, 0.04, 16)
    return levels[torch.randint(16, shape, generator=generator)]


def fused_qkv(q, k, v, g, groups, elementwise_gate):
    """For each group the rows of its queries, elementwise gates, key and value; else the gates are at the end."""
    rows = []
    per_head = g.repeat_interleave(q.shape[0] // g.shape[0], 0)
    for query, gate, key, value in zip(*(tensor.chunk(groups) for tensor in (q, per_head, k, v))):
        rows += [query, gate, key, value] if elementwise_gate else [query, key, value]
    return torch.cat(rows if elementwise_gate else [*rows, g])


def megatron_values(model, values, elementwise_gate):
    """Values of the parameters of the model below, by their names, from values by published names."""
    result = {}
    take = lambda name: values[name]

    def layer(theirs, ours, index):
        for name, published in {
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "self_attention.q_layernorm": "self_attn.q_norm",
            "self_attention.k_layernorm": "self_attn.k_norm",
            "self_attention.linear_proj": "self_attn.o_proj",
        }.items():
            result[f"{theirs}.{name}.weight"] = take(f"{ours}.{published}.weight")
        qkvg = [take(f"{ours}.self_attn.{part}_proj.weight") for part in "qkvg"]
        result[f"{theirs}.self_attention.linear_qkv.weight"] = fused_qkv(*qkvg, model.groups, elementwise_gate)

        def feed_forward(theirs, ours, pick=lambda tensor: tensor):
            gate_up = [pick(take(f"{ours}.{part}_proj.weight")) for part in ("gate", "up")]
            result[f"{theirs}.linear_fc1.weight"] = torch.cat(gate_up)
            result[f"{theirs}.linear_fc2.weight"] = pick(take(f"{ours}.down_proj.weight"))

        if not model.has_experts(index):
            return feed_forward(f"{theirs}.mlp", f"{ours}.mlp")
        result[f"{theirs}.mlp.router.weight"] = take(f"{ours}.moe.gate.weight")
        if f"{ours}.moe.router_bias" in values:
            result[f"{theirs}.mlp.router.expert_bias"] = take(f"{ours}.moe.router_bias")
        feed_forward(f"{theirs}.mlp.shared_experts", f"{ours}.share_expert")
        for expert in range(model.num_experts):
            theirs_expert = f"{theirs}.mlp.experts.local_experts.{expert}"
            feed_forward(theirs_expert, f"{ours}.moe", lambda tensor: tensor[expert])

    def padded(tensor):
        return torch.cat([tensor, torch.full([padded_size(model) - len(tensor), tensor.shape[1]], 0.5)])

    language = "language_model."
    result[f"{language}embedding.word_embeddings.weight"] = padded(take("model.embed_tokens.weight"))
    result[f"{language}output_layer.weight"] = padded(take("lm_head.weight"))
    result[f"{language}decoder.final_layernorm.weight"] = take("model.norm.weight")
    for index in range(model.num_layers):
        layer(f"{language}decoder.layers.{index}", f"model.layers.{index}", index)
    for depth in range(model.num_mtp_layers):
        theirs, ours = f"{language}mtp.layers.{depth}", f"model.layers.{model.num_layers + depth}"
        for name in ("enorm", "hnorm", "eh_proj"):
            result[f"{theirs}.{name}.weight"] = take(f"{ours}.{name}.weight")
        result[f"{theirs}.final_layernorm.weight"] = take(f"{ours}.transformer.shared_head.norm.weight")
        layer(f"{theirs}.transformer_layer", ours, model.num_layers + depth)
    for name in values:
        if name.startswith("vision_model."):
            result[name] = take(name)
        if name.startswith("vit_large_projector."):
            result[name.replace("vit_large_projector", "image_insert_embedding.align_projector")] = take(name)
    return result


def padded_size(model):
    return -(-model.vocabulary_size // 128) * 128


def build(model, config, shapes, elementwise_gate):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import MegatronModule, TransformerConfig

    text = config["text_config"]
    settings = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.heads(0),
        num_query_groups=model.groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=text["intermediate_size"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        add_bias_linear=False,
        activation_func=torch.nn.functional.silu,
        qk_layernorm=True,
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=text["moe_intermediate_size"],
        moe_layer_freq=[int(model.has_experts(index)) for index in range(model.num_layers)],
        moe_router_topk=text["moe_top_k"],
        moe_shared_expert_intermediate_size=text["share_expert_dim"],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_load_balancing_type="none",
        mtp_num_layers=model.num_mtp_layers or None,
        use_cpu_initialization=True,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    spec = get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    mtp = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False) if model.num_mtp_layers else None
    language = GPTModel(
        settings,
        spec,
        vocab_size=padded_size(model),
        max_sequence_length=128,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=mtp,
    )
    layers = [(index, layer) for index, layer in enumerate(language.decoder.layers)]
    if mtp:
        layers += [(model.num_layers + i, layer.transformer_layer) for i, layer in enumerate(language.mtp.layers)]
    options = {"config": settings, "init_method": settings.init_method, "bias": False, "skip_bias_add": False}
    for index, layer in layers:
        # Numbers of heads that differ from layer to layer, and gates: megatron-core has neither.
        rows = model.qkv_rows(index, elementwise_gate)
        layer.self_attention.linear_qkv = ColumnParallelLinear(model.hidden_size, rows, gather_output=False, **options)
        columns = model.heads(index) * model.head_dim
        layer.self_attention.linear_proj = RowParallelLinear(
            columns, model.hidden_size, input_is_parallel=True, **options
        )

    whole = MegatronModule(settings)
    whole.language_model = language
    for name, shape in shapes.items():
        name = name.replace("vit_large_projector", "image_insert_embedding.align_projector")
        if not name.startswith(("vision_model.", "image_insert_embedding.")):
            continue
        module, *path = whole, *name.split(".")
        for part in path[:-1]:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(path[-1], torch.nn.Parameter(torch.empty(shape)))
    return settings, whole.bfloat16()


def save(model, config, values, folder, optimizer_layout, elementwise_gate):
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings, module = build(model, config, published_shapes(model), elementwise_gate)
    for router in (part for part in module.modules() if hasattr(part, "expert_bias")):
        router.expert_bias.data = router.expert_bias.data.float()
    laid_out = {role: megatron_values(model, values[role], elementwise_gate) for role in values}
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, value in laid_out["parameter"].items():
        assert tensors[name].shape == value.shape, (name, tensors[name].shape, value.shape)
        tensors[name].data.copy_(value)
    wrapped = DistributedDataParallel(settings, DistributedDataParallelConfig(use_distributed_optimizer=True), module)
    options = OptimizerConfig(
        optimizer="adam", lr=1e-3, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True
    )
    optimizer = get_megatron_optimizer(options, [wrapped])
    for _ in range(STEP):
        for parameter in module.parameters():
            parameter.main_grad.fill_(1e-3)
        optimizer.step()
    for part in optimizer.chained_optimizers:
        for name, parameter in module.named_parameters():
            if parameter not in part.model_param_gbuf_map:
                continue
            states = part._get_main_param_and_optimizer_states(parameter)
            for theirs, role in {"param": "parameter", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}.items():
                states[theirs].copy_(laid_out[role][name].flatten())
    for name, value in laid_out["parameter"].items():
        tensors[name].data.copy_(value)
    folder.mkdir()
    layout = {"distrib_optim_sharding_type": optimizer_layout, "chained_optim_avoid_prefix": True}
    state = dict(module.sharded_state_dict(metadata=layout))
    state["optimizer"] = optimizer.sharded_state_dict(dict(state), metadata=layout)
    state |= {"iteration": STEP, "checkpoint_version": 3.0, "args": argparse.Namespace(num_layers=model.num_layers)}
    dist_checkpointing.save(state, str(folder), content_metadata=layout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    pretend_to_have_a_gpu()
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel()
    config = json.loads(arguments.config.read_text())
    model = Model(config)
    values = {
        role: {name: drawn(name, shape, role) for name, shape in published_shapes(model).items()}
        for role in ("parameter", "exp_avg", "exp_avg_sq")
    }
    for tensors in values.values():
        for depth in range(model.num_mtp_layers):
            ours = f"model.layers.{model.num_layers + depth}.transformer.shared_head.output.weight"
            tensors[ours] = tensors["lm_head.weight"]  # Megatron has one for all
    for role in ("exp_avg", "exp_avg_sq"):
        values[role] = {name: tensor for name, tensor in values[role].items() if not name.endswith("router_bias")}
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, OnCpu():
        scratch = pathlib.Path(scratch)
        for name, layout, elementwise in (
            ("head_gates", "fully_reshardable", False),
            ("element_gates", "fully_reshardable", True),
            ("dp_reshardable", "dp_reshardable", False),
        ):
            save(model, config, values, scratch / name, layout, elementwise)
            if layout == "dp_reshardable":  # which is refused: its values are never read
                for values_file in (scratch / name).glob("*.distcp"):
                    values_file.unlink()
            with tarfile.open(arguments.folder / f"{name}.tar.xz", "w:xz") as archive:
                archive.add(scratch / name, f"iter_{STEP:07}")
    expected = {
        f"{role}/{name}": hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for role, tensors in values.items()
        for name, tensor in tensors.items()
    }
    (arguments.folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
