"""Tiny random models under the names of published checkpoints, for the scripts that quantise them with the
packages of others."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3MoeConfig

HIDDEN, HEADS, HEAD_DIM, WIDTH, VOCABULARY, EXPERTS = 32, 2, 16, 64, 64, 4
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def model(moe, kv_heads=1):
    """config.json and tensors, in f32, of a Qwen3 of one layer, or of one with experts."""
    torch.manual_seed(3 if moe else 2)
    block = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        f"{block}.input_layernorm.weight": (HIDDEN,),
        f"{block}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        f"{block}.self_attn.k_proj.weight": (kv_heads * HEAD_DIM, HIDDEN),
        f"{block}.self_attn.v_proj.weight": (kv_heads * HEAD_DIM, HIDDEN),
        f"{block}.self_attn.q_norm.weight": (HEAD_DIM,),
        f"{block}.self_attn.k_norm.weight": (HEAD_DIM,),
        f"{block}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{block}.post_attention_layernorm.weight": (HIDDEN,),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    common = {**COMMON, "num_key_value_heads": kv_heads}
    if moe:
        width = WIDTH // 2
        config = Qwen3MoeConfig(
            **common, moe_intermediate_size=width, num_experts=EXPERTS, num_experts_per_tok=2, norm_topk_prob=True
        )
        shapes[f"{block}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        mlps = [f"{block}.mlp.experts.{expert}" for expert in range(EXPERTS)]
        config.architectures = ["Qwen3MoeForCausalLM"]
    else:
        width, mlps, config = WIDTH, [f"{block}.mlp"], Qwen3Config(**common)
        config.architectures = ["Qwen3ForCausalLM"]
    for mlp in mlps:
        shapes |= {f"{mlp}.{name}.weight": (width, HIDDEN) for name in ("gate_proj", "up_proj")}
        shapes[f"{mlp}.down_proj.weight"] = (HIDDEN, width)
    tensors = {name: torch.randn(shape) / (1 if len(shape) == 1 else 5) for name, shape in shapes.items()}
    return json.loads(config.to_json_string(use_diff=False)), tensors


def linears(tensors):
    """The modules that packages quantise: all linears but head and router."""
    matrices = (name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2)
    return [name for name in matrices if not name.endswith(("embed_tokens", "lm_head", ".gate"))]


def save(folder, config, tensors, expected):
    """A folder, and beside it the values that the package decodes it to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    save_file({name: t.float().contiguous() for name, t in expected.items()}, folder / "expected.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
