#!/usr/bin/env python3
"""Makes the folders of MLX that this project is tested against.

    pip install -r scripts/goldens/mlx-requirements.txt
    python scripts/goldens/make_mlx_goldens.py

`crates/marlin-checkpoint/tests/goldens/mlx/` holds a module in each mode and width of `mlx.core.quantize`, with what
`mlx.core.dequantize` makes of it in float32 (expected.safetensors).

`crates/marlin-model/tests/goldens/mlx-…/` are tiny random models that `mlx-lm` quantised and wrote. Their logits are
what `transformers` computes in float32 from the weights that `mlx.core.dequantize` gives, put back under the names of
Hugging Face; golden.safetensors holds them as `make_model_goldens.py` says.
"""

import json
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from make_model_goldens import ROUTER_GAP, TOKENS, randomise, rewrite_config, run
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Glm4MoeLiteForCausalLM,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MixtralForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

CRATES = Path(__file__).resolve().parents[2] / "crates"


def make_modules(folder):
    """A module of each kind, some of them with groups that begin with their largest value, whose scale is negative."""
    cases = {  # module: (mode, group, bits, shape, type)
        **{f"a.u{bits}": ("affine", 32, bits, (6, 96), mx.float16) for bits in (2, 3, 4, 5, 6, 8)},
        "a.u4_g64": ("affine", 64, 4, (5, 128), mx.bfloat16),
        "a.u3_g128": ("affine", 128, 3, (4, 256), mx.float32),
        "model.layers.0.mlp.switch_mlp.up_proj": ("affine", 32, 5, (3, 4, 64), mx.bfloat16),
        "b.mxfp4": ("mxfp4", 32, 4, (5, 64), mx.float32),
        "b.mxfp8": ("mxfp8", 32, 8, (5, 64), mx.float32),
        "b.nvfp4": ("nvfp4", 16, 4, (5, 64), mx.float32),
        "model.layers.0.mlp.switch_mlp.down_proj": ("mxfp4", 32, 4, (3, 4, 32), mx.float32),
    }
    mx.random.seed(1)
    quantization = {"group_size": 32, "bits": 4, "mode": "affine", "plain": False}
    tensors, expected = {}, {}
    for module, (mode, group, bits, shape, dtype) in cases.items():
        packed = mx.quantize(mx.random.normal(shape).astype(dtype), group_size=group, bits=bits, mode=mode)
        tensors |= {f"{module}.{part}": t for part, t in zip(["weight", "scales", "biases"], packed)}
        if (mode, group, bits) != ("affine", 32, 4):
            quantization[module] = {"group_size": group, "bits": bits, "mode": mode}
        decoded = dequantize(packed, quantization.get(module, quantization))
        if decoded.ndim == 3:
            block, last = module.split(".switch_mlp.")
            expected |= {f"{block}.experts.{e}.{last}.weight": decoded[e] for e in range(len(decoded))}
        else:
            expected[f"{module}.weight"] = decoded
    assert any((t < 0).any() for name, t in tensors.items() if name.endswith(".scales"))
    tensors["plain.weight"] = mx.random.normal((3, 8))
    expected["plain.weight"] = tensors["plain.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})
    mx.save_safetensors(str(folder / "expected.safetensors"), expected)
    config = {"model_type": "test", "quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def dequantize(packed, params):
    """In float32: scales and biases are widened first, or the result is taken in float32 where they are bytes."""
    codes, *scales = packed
    if params.get("mode", "affine") == "affine":
        return mx.dequantize(codes, *(s.astype(mx.float32) for s in scales), params["group_size"], params["bits"])
    return mx.dequantize(codes, *scales, mode=params["mode"], dtype=mx.float32)


def uniform(group, bits, mode="affine"):
    """Every module that can be."""
    return dict(group_size=group, bits=bits, mode=mode), None


def mixed(path, _):
    """As published mixes are: more bits for some modules, none quantised at all for others."""
    if "v_proj" in path or "down_proj" in path:
        return {"group_size": 32, "bits": 6}
    return "o_proj" not in path


def as_gpt_oss(path, module):
    """Experts stay MXFP4; all else in 8 bits."""
    return True if "experts" in path else {"group_size": 32, "bits": 8}


# name: (model class, config arguments, dtype, (arguments of quantize_model, predicate))
MODELS = {
    "mlx-llama-u4-tied": (
        LlamaForCausalLM,
        dict(
            hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
        ),
        torch.float16,
        uniform(32, 4),
    ),
    "mlx-qwen3-mixed": (
        Qwen3ForCausalLM,
        dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
        torch.bfloat16,
        (dict(group_size=32, bits=3), mixed),
    ),
    "mlx-qwen3-nvfp4": (
        Qwen3ForCausalLM,
        dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
        torch.bfloat16,
        uniform(16, 4, "nvfp4"),
    ),
    "mlx-qwen3moe-u5": (
        Qwen3MoeForCausalLM,
        dict(
            hidden_size=64,
            intermediate_size=64,
            moe_intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        torch.bfloat16,
        uniform(32, 5),
    ),
    "mlx-mixtral-u4": (
        MixtralForCausalLM,
        dict(
            hidden_size=64,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        torch.bfloat16,
        uniform(32, 4),
    ),
    "mlx-glm4moelite-u8": (
        Glm4MoeLiteForCausalLM,
        dict(
            hidden_size=64,
            intermediate_size=96,
            moe_intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_shared_experts=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=8,
            v_head_dim=32,
            first_k_dense_replace=1,
            mlp_layer_types=["dense", "sparse"],
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.8,
            norm_topk_prob=True,
        ),
        torch.bfloat16,
        uniform(32, 8),
    ),
    "mlx-gptoss-mxfp4": (
        GptOssForCausalLM,
        dict(
            hidden_size=64,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        torch.bfloat16,
        (dict(group_size=None, bits=None, mode="mxfp4"), as_gpt_oss),
    ),
}


def make_model(folder, model_class, arguments, dtype, quantization):
    settings, predicate = quantization
    torch.manual_seed(1)
    rope = dict(rope_type="default", rope_theta=10000.0)
    arguments = dict(vocab_size=67, num_hidden_layers=2, max_position_embeddings=64, rope_parameters=rope) | arguments
    config = model_class.config_class(**arguments)
    model = model_class(config)
    randomise(model)
    with tempfile.TemporaryDirectory() as scratch:
        model.to(dtype).save_pretrained(scratch)
        # mlx-lm knows older spellings only. (Without rope_parameters gpt-oss has YaRN.)
        older = {"rope_theta": 10000.0}
        if "num_experts" in arguments:
            older |= {"num_experts": arguments["num_experts"], "num_local_experts": None}
        if model_class is not GptOssForCausalLM:
            older["rope_parameters"] = None
        rewrite_config(Path(scratch, "config.json"), older)
        if model_class is GptOssForCausalLM:
            split_gpt_oss(Path(scratch))
        ours, own_config = load_model(Path(scratch))
        ours, own_config = quantize_model(ours, own_config, quant_predicate=predicate, **settings)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(folder, ours)
        save_config(own_config, folder / "config.json")
        (folder / "model.safetensors.index.json").unlink()
        (folder / "README.md").unlink(missing_ok=True)

    oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()), attn_implementation="eager")
    oracle = oracle.float().eval()
    weights = to_transformers(folder, config)
    missing, unexpected = oracle.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    oracle.tie_weights()
    gap = 0
    while gap < ROUTER_GAP:
        input_ids = torch.randint(config.vocab_size, (1, TOKENS))
        logits, gap = run(oracle, input_ids)
    save_file({"input_ids": input_ids[0].int(), "logits": logits.contiguous()}, folder / "golden.safetensors")
    print(f"{folder.name}: logits of standard deviation {logits.std():.2f}, experts apart by {gap:.4f}")


def split_gpt_oss(folder):
    """Experts under the names that mlx-lm has for them: it takes apart only those that are MXFP4 already."""
    tensors = mx.load(str(folder / "model.safetensors"))
    for name in [name for name in tensors if ".experts." in name]:
        value = tensors.pop(name)
        bias = "bias" if name.endswith("_bias") else "weight"
        name = name.removesuffix("_bias")
        if bias == "weight":
            value = value.swapaxes(-1, -2)
        halves = {name: value}
        if name.endswith("gate_up_proj"):
            rows = (lambda first: value[:, first::2]) if bias == "bias" else (lambda first: value[:, first::2, :])
            halves = {name.replace("gate_up", half): rows(first) for first, half in enumerate(["gate", "up"])}
        tensors |= {f"{half}.{bias}": mx.contiguous(rows) for half, rows in halves.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "mlx"})


def to_transformers(folder, config):
    """The weights that MLX decodes, in float32, as `transformers` has them in memory."""
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    stored = mx.load(str(folder / "model.safetensors"))
    dense = {}
    for name, value in stored.items():
        module = name.rpartition(".")[0]
        if f"{module}.scales" not in stored or name.endswith(".bias"):
            dense[name] = value.astype(mx.float32)
        elif name.endswith(".weight"):
            parts = (stored.get(f"{module}.{part}") for part in ("weight", "scales", "biases"))
            dense[name] = dequantize([part for part in parts if part is not None], quantization.get(module, quantization))
    weights = {name: torch.from_numpy(np.array(value)) for name, value in dense.items()}
    renamed = {}
    for name, value in weights.items():
        block, _, last = name.replace("block_sparse_moe", "mlp").partition(".switch_mlp.")
        if name.endswith("gate_proj.weight") and value.ndim == 3:
            up = weights[name.replace("gate_proj", "up_proj")]
            if config.model_type == "gpt_oss":
                fused = torch.stack([value, up], 2).flatten(1, 2).transpose(1, 2)
                renamed[name.replace("gate_proj.weight", "gate_up_proj")] = fused
            else:
                renamed[f"{block}.experts.gate_up_proj"] = torch.cat([value, up], 1)
        elif name.endswith(".experts.gate_proj.bias"):
            up = weights[name.replace("gate_proj", "up_proj")]
            renamed[name.replace("gate_proj.bias", "gate_up_proj_bias")] = torch.stack([value, up], 2).flatten(1)
        elif name.endswith(".experts.down_proj.bias"):
            renamed[name.replace("down_proj.bias", "down_proj_bias")] = value
        elif name.endswith("down_proj.weight") and value.ndim == 3:
            is_gpt_oss = config.model_type == "gpt_oss"
            name = name.removesuffix(".weight") if is_gpt_oss else f"{block}.experts.down_proj"
            renamed[name] = value.transpose(1, 2) if is_gpt_oss else value
        elif name.endswith("embed_q.weight"):
            values = weights[name.replace("embed_q", "unembed_out")]
            rows = torch.cat([value.transpose(1, 2), values], 1).flatten(0, 1)
            renamed[name.replace("embed_q", "kv_b_proj")] = rows
        elif value.ndim == 3 or ".experts.up_proj" in name or "unembed_out" in name:
            continue
        else:
            renamed[name.replace("block_sparse_moe", "mlp")] = value
    return {name: value.contiguous() for name, value in renamed.items()}


if __name__ == "__main__":
    make_modules(CRATES / "marlin-checkpoint/tests/goldens/mlx")
    for name, recipe in MODELS.items():
        make_model(CRATES / "marlin-model/tests/goldens" / name, *recipe)
