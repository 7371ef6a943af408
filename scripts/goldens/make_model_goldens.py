#!/usr/bin/env python3
"""Makes the tiny random checkpoints and the logits that marlin-model is tested against.

    pip install -r scripts/goldens/requirements.txt
    python scripts/goldens/make_model_goldens.py

Each golden is a folder `crates/marlin-model/tests/goldens/<name>/` with config.json, safetensors weights, and
golden.safetensors: `input_ids` (int32, [40]) and `logits` (float32, [40, vocabulary]). The logits are what
`transformers` computes, in float32 with eager attention, from the folder as written, so that config.json and the
rounded weights are read by the oracle exactly as they are by the code under test. Seeds are fixed: a second run on the
same machine writes the same bytes.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

GOLDENS = Path(__file__).resolve().parents[2] / "crates" / "marlin-model" / "tests" / "goldens"
TOKENS = 40

# name: (model class, config arguments, dtype of the stored weights, how the folder is stored)
#   shard:  split the weights into files of at most this size
#   config: keys of config.json that are dropped or replaced after saving, to read configs as older releases wrote them
GOLDENS_TO_MAKE = {
    # Llama 1/2 style: one KV head per head, no head_dim, no num_key_value_heads, rope_theta at the top; 40 and 88 are
    # no multiples of 32.
    "llama-mha-untied": (
        LlamaForCausalLM,
        dict(vocab_size=67, hidden_size=40, intermediate_size=88, num_attention_heads=4, tie_word_embeddings=False),
        torch.float32,
        dict(
            config=dict(
                head_dim=None, num_key_value_heads=None, rope_parameters=None, rope_theta=10000.0, rope_scaling=None
            )
        ),
    ),
    # Llama 3.2 style: tied, llama3 scaling with an original context inside the tested one, head_dim above hidden/heads.
    # An epsilon large enough to be seen.
    "llama-gqa2-llama3-tied": (
        LlamaForCausalLM,
        dict(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            tie_word_embeddings=True,
            rms_norm_eps=0.05,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=5000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        ),
        torch.bfloat16,
        {},
    ),
    # Biases on every projection, linear scaling in the oldest spelling, several shards.
    "llama-gqa4-bias-sharded": (
        LlamaForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=64,
            intermediate_size=80,
            num_attention_heads=8,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=3.0),
        ),
        torch.float16,
        dict(
            shard="24KB",
            config=dict(rope_parameters=None, rope_theta=1000.0, rope_scaling=dict(type="linear", factor=3.0)),
        ),
    ),
    # Three query heads a KV head, llama3 scaling in the spelling of Llama 3.1, GELU gate, head_dim below hidden/heads.
    "llama-gqa3-llama3-gelu": (
        LlamaForCausalLM,
        dict(
            vocab_size=101,
            hidden_size=72,
            intermediate_size=72,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=500.0,
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=2.0,
                original_max_position_embeddings=20,
            ),
        ),
        torch.bfloat16,
        dict(
            config=dict(
                rope_parameters=None,
                rope_theta=500.0,
                rope_scaling=dict(
                    rope_type="llama3",
                    factor=4.0,
                    low_freq_factor=1.0,
                    high_freq_factor=2.0,
                    original_max_position_embeddings=20,
                ),
            )
        ),
    ),
    # Qwen3-0.6B in small: tied, two query heads a KV head, head_dim twice hidden/heads.
    "qwen3-gqa2-tied": (
        Qwen3ForCausalLM,
        dict(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            tie_word_embeddings=True,
        ),
        torch.bfloat16,
        dict(config=dict(rope_parameters=None, rope_theta=10000.0, rope_scaling=None)),
    ),
    # Biases on the attention projections, untied, several shards, an epsilon large enough to be seen.
    "qwen3-gqa4-bias-sharded": (
        Qwen3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=48,
            intermediate_size=112,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            attention_bias=True,
            tie_word_embeddings=False,
            rms_norm_eps=0.02,
        ),
        torch.float16,
        dict(shard="24KB"),
    ),
    # Full precision, one KV head per head, linear scaling; 40 and 56 are no multiples of 32.
    "qwen3-mha-linear": (
        Qwen3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=56,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=24,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="linear", rope_theta=2000.0, factor=2.5),
        ),
        torch.float32,
        {},
    ),
    # A sliding window from layer 1 on, told by max_window_layers alone; three query heads a KV head.
    "qwen3-gqa3-window": (
        Qwen3ForCausalLM,
        dict(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=7,
            max_window_layers=1,
        ),
        torch.bfloat16,
        dict(config=dict(layer_types=None)),
    ),
    # A sliding window in the layers that layer_types names, with llama3 scaling.
    "qwen3-layer-types-llama3": (
        Qwen3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=False,
            use_sliding_window=True,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=10000.0,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=24,
            ),
        ),
        torch.bfloat16,
        {},
    ),
}


def make_golden(name, seed, model_class, arguments, dtype, storage):
    """Writes one golden folder."""
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    config_class = {LlamaForCausalLM: LlamaConfig, Qwen3ForCausalLM: Qwen3Config}[model_class]
    config = config_class(**{"num_hidden_layers": 2, "max_position_embeddings": 64, **arguments})
    model = model_class(config).eval()
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=storage.get("shard", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    rewrite_config(folder / "config.json", storage.get("config", {}))

    input_ids = torch.randint(config.vocab_size, (1, TOKENS))
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = oracle(input_ids).logits[0]
    save_file({"input_ids": input_ids[0].to(torch.int32), "logits": logits}, folder / "golden.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size / 1024:.0f} KiB, logits of standard deviation {logits.std():.2f}")


@torch.no_grad()
def randomise(model):
    """Draws every parameter wide enough that a wrong norm, bias, head or position shows in the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.3)
        elif name.endswith("embed_tokens.weight"):
            parameter.normal_(std=1.0)
        else:
            parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)


def rewrite_config(path, changes):
    """Replaces keys of a config.json; those given as None are dropped."""
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    path.write_text(json.dumps(config, indent=2) + "\n")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for seed, (name, golden) in enumerate(GOLDENS_TO_MAKE.items()):
        make_golden(name, seed, *golden)


if __name__ == "__main__":
    main()
