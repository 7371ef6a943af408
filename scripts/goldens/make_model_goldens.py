#!/usr/bin/env python3
"""Makes the tiny random checkpoints and the logits that marlin-model is tested against.

    pip install -r scripts/goldens/requirements.txt
    python scripts/goldens/make_model_goldens.py [NAME ...]

Each golden is a folder `crates/marlin-model/tests/goldens/<name>/` with config.json, safetensors weights, and
golden.safetensors: `input_ids` (int32, [40]) and `logits` (float32, [40, vocabulary]). The logits are what
`transformers` computes, in float32 with eager attention, from the folder as written, so that config.json and the
rounded weights are read by the oracle exactly as they are by the code under test. Seeds are fixed: a second run on the
same machine writes the same bytes. Names select the goldens to make; without any, all are made.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

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
    # Qwen2.5-0.5B in small: tied, biases on Q, K and V, a window that is not used.
    "qwen2-gqa3-tied": (
        Qwen2ForCausalLM,
        dict(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=72,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            use_sliding_window=False,
            sliding_window=5,
            max_window_layers=1,
        ),
        torch.bfloat16,
        dict(config=dict(layer_types=None, rope_parameters=None, rope_theta=10000.0, sliding_window=5)),
    ),
    # YaRN as Qwen2.5's model cards spell it, stretched past its original context within the tested one; several shards.
    "qwen2-gqa2-yarn-sharded": (
        Qwen2ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=64,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16
            ),
        ),
        torch.float16,
        dict(
            shard="24KB",
            config=dict(
                rope_parameters=None,
                rope_theta=1000.0,
                rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16),
            ),
        ),
    ),
    # A sliding window from layer 1 on; 40 and 56 are no multiples of 32.
    "qwen2-mha-window": (
        Qwen2ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=3,
            num_attention_heads=5,
            num_key_value_heads=5,
            tie_word_embeddings=False,
            use_sliding_window=True,
            sliding_window=9,
            max_window_layers=1,
        ),
        torch.bfloat16,
        {},
    ),
    # Mistral 7B v0.1 in small: a window in every layer, four query heads a KV head.
    "mistral-gqa4-window": (
        MistralForCausalLM,
        dict(
            vocab_size=101,
            hidden_size=64,
            intermediate_size=64,
            num_attention_heads=8,
            num_key_value_heads=2,
            sliding_window=7,
            rms_norm_eps=1e-5,
        ),
        torch.bfloat16,
        dict(config=dict(head_dim=None, rope_parameters=None, rope_theta=10000.0)),
    ),
    # Mistral Nemo in small: no window, heads wider than their share of the hidden size; several shards.
    "mistral-gqa2-wide-sharded": (
        MistralForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=88,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            sliding_window=None,
        ),
        torch.float16,
        dict(shard="24KB"),
    ),
    # YaRN with every setting of its own; the window is Mistral's usual one because none is named.
    "mistral-mha-yarn": (
        MistralForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=48,
            intermediate_size=64,
            num_attention_heads=3,
            num_key_value_heads=3,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=500.0,
                factor=8.0,
                beta_fast=4.0,
                beta_slow=0.5,
                mscale=1.0,
                mscale_all_dim=0.5,
                truncate=False,
                original_max_position_embeddings=20,
            ),
        ),
        torch.bfloat16,
        dict(config=dict(sliding_window=None)),
    ),
    # Phi-3-mini in small: one KV head per head, a window, Q, K and V in one tensor as gate and up are.
    "phi3-mha-window": (
        Phi3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=48,
            intermediate_size=88,
            num_attention_heads=3,
            sliding_window=11,
            tie_word_embeddings=False,
        ),
        torch.bfloat16,
        dict(config=dict(num_key_value_heads=None)),
    ),
    # Phi-4-mini in small: tied, three quarters of a head rotated, several shards.
    "phi3-gqa3-partial-sharded": (
        Phi3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=96,
            intermediate_size=24,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.75),
        ),
        torch.float16,
        dict(
            shard="40KB",
            config=dict(rope_parameters=None, rope_theta=10000.0, partial_rotary_factor=0.75, rope_scaling=None),
        ),
    ),
    # An odd share of a head, which is rounded up to whole pairs: 0.4 of 24 is 9.
    "phi3-gqa2-odd-rotary": (
        Phi3ForCausalLM,
        dict(
            vocab_size=101,
            hidden_size=48,
            intermediate_size=40,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=300.0, partial_rotary_factor=0.4),
        ),
        torch.bfloat16,
        {},
    ),
    # Gemma 3 1B in small, as its config.json is written: tied, one KV head, every third layer without a window, two
    # bases. The root of 72 is rounded in bfloat16.
    "gemma3-gqa4-tied": (
        Gemma3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=72,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=24,
            query_pre_attn_scalar=24,
            sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="default", rope_theta=5000.0),
                sliding_attention=dict(rope_type="default", rope_theta=100.0),
            ),
        ),
        torch.bfloat16,
        dict(
            config=dict(
                layer_types=None,
                sliding_window_pattern=3,
                tie_word_embeddings=None,
                hidden_activation=None,
                rope_parameters=None,
                rope_theta=5000.0,
                rope_local_base_freq=100.0,
                rope_scaling=None,
            )
        ),
    ),
    # The present spelling, linear scaling where there is no window as in the larger models, capped logits, scores
    # scaled by another width than the head's; untied, several shards. The root of 56 is rounded in half precision.
    "gemma3-gqa2-linear-softcap-sharded": (
        Gemma3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=56,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=40,
            sliding_window=12,
            final_logit_softcapping=5.0,
            tie_word_embeddings=False,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=4.0, rope_theta=2000.0),
                sliding_attention=dict(rope_type="default", rope_theta=50.0),
            ),
        ),
        torch.float16,
        dict(shard="24KB"),
    ),
    # Full precision, one KV head per head, biases, an epsilon large enough to be seen, the older spelling of scaling.
    "gemma3-mha-bias": (
        Gemma3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=56,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
            attention_bias=True,
            rms_norm_eps=0.02,
            sliding_window=10,
            layer_types=["full_attention", "sliding_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=2.0, rope_theta=3000.0),
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
            ),
        ),
        torch.float32,
        dict(
            config=dict(
                rope_parameters=None,
                rope_theta=3000.0,
                rope_scaling=dict(rope_type="linear", factor=2.0),
                dtype=None,
                torch_dtype="float32",
            )
        ),
    ),
}


def make_golden(name, seed, model_class, arguments, dtype, storage):
    """Writes one golden folder."""
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    defaults = {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": None}
    config = model_class.config_class(**{**defaults, **arguments})
    model = model_class(config).eval()
    randomise(model)
    model.to(dtype).save_pretrained(folder, max_shard_size=storage.get("shard", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    rewrite_config(folder / "config.json", storage.get("config", {}))

    input_ids = torch.randint(config.vocab_size, (1, TOKENS))
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    if model_class is Gemma3ForCausalLM:
        # Computed in the type of the weights, as a model is that is not loaded as float32.
        embedding = oracle.model.embed_tokens
        embedding.embed_scale = embedding.embed_scale.to(dtype).to(torch.float32)
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
            # Gemma stores the difference to 1.
            centre = 0.0 if isinstance(model, Gemma3ForCausalLM) else 1.0
            parameter.uniform_(centre - 0.5, centre + 0.5)
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
    wanted = set(sys.argv[1:]) or set(GOLDENS_TO_MAKE)
    if unknown := wanted - set(GOLDENS_TO_MAKE):
        sys.exit(f"unknown goldens: {', '.join(sorted(unknown))}; known are {', '.join(GOLDENS_TO_MAKE)}")
    for seed, (name, golden) in enumerate(GOLDENS_TO_MAKE.items()):
        if name in wanted:
            make_golden(name, seed, *golden)


if __name__ == "__main__":
    main()
