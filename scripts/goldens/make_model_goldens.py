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
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Glm4ForCausalLM,
    Glm4MoeForCausalLM,
    Glm4MoeLiteForCausalLM,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

GOLDENS = Path(__file__).resolve().parents[2] / "crates" / "marlin-model" / "tests" / "goldens"
TOKENS = 40


def fuse_experts(tensors, model):
    """All experts of a layer in one tensor, as transformers has them in memory; Mixtral's under their present names."""
    gates = {f"{name}.weight": router.weight for name, router in model.named_modules() if name.endswith("mlp.gate")}
    fused = {name: value for name, value in model.state_dict().items() if ".mlp.experts." in name}
    return {
        **{name: value for name, value in tensors.items() if not is_of_experts(name)},
        **{name: value.contiguous() for name, value in {**gates, **fused}.items()},
    }


def is_of_experts(name):
    return ".experts." in name or ".block_sparse_moe." in name


def add_prediction_layer(tensors, model):
    """A layer behind the last one, which transformers ignores: that one's tensors and those of its own."""
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    last, extra = f"model.layers.{layers - 1}.", f"model.layers.{layers}."
    copies = {extra + name.removeprefix(last): -value for name, value in tensors.items() if name.startswith(last)}
    embedding = tensors["model.embed_tokens.weight"]
    own = {
        "eh_proj.weight": torch.zeros(hidden, 2 * hidden, dtype=embedding.dtype),
        "enorm.weight": torch.zeros(hidden, dtype=embedding.dtype),
        "hnorm.weight": torch.zeros(hidden, dtype=embedding.dtype),
        "shared_head.norm.weight": torch.zeros(hidden, dtype=embedding.dtype),
        "shared_head.head.weight": torch.zeros_like(embedding),
    }
    return {**tensors, **copies, **{extra + name: value for name, value in own.items()}}


def experts_to_mxfp4(tensors, _):
    """Experts in MXFP4, of random codes and scales."""
    packed = dict(tensors)
    for name, value in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, cols, rows = value.shape
            del packed[name]
            packed[f"{name}_blocks"] = torch.randint(256, (experts, rows, cols // 32, 16), dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(123, 126, (experts, rows, cols // 32), dtype=torch.uint8)
    return packed


# name: (model class, config arguments, dtype of the stored weights, how the folder is stored)
#   shard:  split the weights into files of at most this size
#   config: keys of config.json that are dropped or replaced after saving, to read configs as older releases wrote them
#   edit:   a function of the saved tensors, for what transformers does not write itself; it returns those to store
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
    # Nothing that a GGUF file cannot tell: one layer in six without a window, the usual base in those with one.
    "gemma3-mqa-usual": (
        Gemma3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=7,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=8,
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", factor=2.0, rope_theta=1000000.0),
                sliding_attention=dict(rope_type="default", rope_theta=10000.0),
            ),
        ),
        torch.bfloat16,
        {},
    ),
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
    # Mixtral 8x7B in small, as it is published: two of four experts, four query heads a KV head.
    "mixtral-top2": (
        MixtralForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=1,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        torch.bfloat16,
        dict(config=dict(head_dim=None, rope_parameters=None, rope_theta=1e6)),
    ),
    # A window, one expert a token, experts fused as transformers has them in memory, the base left out; several shards.
    "mixtral-window-fused-sharded": (
        MixtralForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            num_experts_per_tok=1,
            sliding_window=9,
            tie_word_embeddings=True,
        ),
        torch.float16,
        dict(shard="24KB", edit=fuse_experts, config=dict(rope_parameters=None)),
    ),
    # Full precision, linear scaling, wide heads, every expert of a token's five.
    "mixtral-all-experts": (
        MixtralForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=24,
            num_local_experts=5,
            num_experts_per_tok=5,
            rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=2.0),
        ),
        torch.float32,
        {},
    ),
    # Qwen3-30B-A3B in small: head_dim above hidden/heads, top-k of eight, weights normalised, the older name of num_local_experts.
    "qwen3moe-top3-norm": (
        Qwen3MoeForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=56,
            moe_intermediate_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=8,
            num_experts_per_tok=3,
            norm_topk_prob=True,
        ),
        torch.bfloat16,
        dict(config=dict(num_local_experts=None, num_experts=8, rope_parameters=None, rope_theta=1e6)),
    ),
    # Weights not normalised, experts in every second layer but one, biases, tied; several shards.
    "qwen3moe-dense-layers-sharded": (
        Qwen3MoeForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=1,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            decoder_sparse_step=2,
            mlp_only_layers=[1],
            attention_bias=True,
            tie_word_embeddings=True,
        ),
        torch.float16,
        dict(shard="24KB"),
    ),
    # Fused experts, a window in every layer, YaRN, full precision.
    "qwen3moe-window-yarn-fused": (
        Qwen3MoeForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            use_sliding_window=True,
            sliding_window=13,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=16
            ),
        ),
        torch.float32,
        dict(edit=fuse_experts),
    ),
    # GLM-4.7-Flash in small, as it is published: one dense layer by the older field, a shared expert, a prediction layer.
    "glm4moelite-shared-mtp": (
        Glm4MoeLiteForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=8,
            num_experts_per_tok=3,
            q_lora_rank=24,
            kv_lora_rank=32,
            qk_nope_head_dim=12,
            qk_rope_head_dim=8,
            v_head_dim=16,
            rms_norm_eps=0.02,
        ),
        torch.bfloat16,
        dict(
            edit=add_prediction_layer,
            config=dict(
                mlp_layer_types=None,
                first_k_dense_replace=1,
                num_nextn_predict_layers=1,
                topk_method="noaux_tc",
                rope_parameters=None,
                rope_theta=10000.0,
            ),
        ),
    ),
    # Groups of experts, queries without a latent vector, half-split rope, weights not normalised, layer kinds by name.
    "glm4moelite-groups-direct": (
        Glm4MoeLiteForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=12,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            norm_topk_prob=False,
            mlp_layer_types=["sparse", "dense", "sparse"],
            q_lora_rank=None,
            kv_lora_rank=24,
            qk_nope_head_dim=8,
            qk_rope_head_dim=16,
            v_head_dim=8,
            rope_interleave=False,
        ),
        torch.float32,
        {},
    ),
    # YaRN with mscale on the scores, biases, two shared experts beside the others, fused; several shards.
    "glm4moelite-yarn-bias-fused-sharded": (
        Glm4MoeLiteForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=8,
            num_attention_heads=3,
            num_key_value_heads=3,
            n_routed_experts=4,
            n_shared_experts=2,
            num_experts_per_tok=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=12,
            attention_bias=True,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=500.0,
                factor=4.0,
                mscale=1.0,
                mscale_all_dim=0.7,
                original_max_position_embeddings=16,
            ),
        ),
        torch.float16,
        dict(shard="24KB", edit=fuse_experts),
    ),
    # DeepSeek-V3 in small: groups, YaRN as it is published with equal mscales, a shared expert, dense first layers.
    "deepseekv3-groups-yarn": (
        DeepseekV3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=40,
            moe_intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=16,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=4,
            first_k_dense_replace=1,
            q_lora_rank=24,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1000.0,
                factor=8.0,
                beta_fast=32,
                beta_slow=1,
                mscale=1.0,
                mscale_all_dim=1.0,
                original_max_position_embeddings=16,
            ),
        ),
        torch.bfloat16,
        dict(
            config=dict(
                rope_parameters=None,
                rope_theta=1000.0,
                rope_scaling=dict(
                    type="yarn",
                    factor=8.0,
                    beta_fast=32,
                    beta_slow=1,
                    mscale=1.0,
                    mscale_all_dim=1.0,
                    original_max_position_embeddings=16,
                ),
                scoring_func="sigmoid",
                topk_method="noaux_tc",
            )
        ),
    ),
    # No dense layer, half-split rope, an epsilon large enough to be seen, tied, a prediction layer; several shards.
    "deepseekv3-half-split-sharded": (
        DeepseekV3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=24,
            moe_intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=6,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=0,
            q_lora_rank=16,
            kv_lora_rank=24,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=24,
            rope_interleave=False,
            rms_norm_eps=0.05,
            tie_word_embeddings=True,
        ),
        torch.float16,
        dict(shard="24KB", edit=add_prediction_layer),
    ),
    # Full precision, queries without a latent vector, three shared experts beside the others, biases.
    "deepseekv3-direct-shared3": (
        DeepseekV3ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=2,
            n_routed_experts=4,
            n_shared_experts=3,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            q_lora_rank=None,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=16,
            attention_bias=True,
        ),
        torch.float32,
        {},
    ),
    # GLM-4-9B-0414 in small: four norms a layer, half of a head rotated in pairs, biases on Q, K and V.
    "glm4-gqa4-bias": (
        Glm4ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=64,
            intermediate_size=72,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            rms_norm_eps=1e-5,
        ),
        torch.bfloat16,
        dict(config=dict(rope_parameters=None, rope_theta=10000.0, partial_rotary_factor=0.5)),
    ),
    # GLM-4-32B-0414 in small: no biases, an epsilon large enough to be seen; several shards.
    "glm4-gqa2-sharded": (
        Glm4ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=48,
            intermediate_size=40,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=16,
            attention_bias=False,
            rms_norm_eps=0.02,
        ),
        torch.float16,
        dict(shard="24KB"),
    ),
    # Full precision, tied, whole heads rotated with YaRN.
    "glm4-mha-yarn": (
        Glm4ForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=24,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=1000.0,
                factor=4.0,
                original_max_position_embeddings=16,
                partial_rotary_factor=1.0,
            ),
        ),
        torch.float32,
        {},
    ),
    # GLM-4.5 in small: half of a head rotated, biases on Q, K and V, norms on heads, a shared expert, a prediction layer.
    "glm4moe-qknorm-mtp": (
        Glm4MoeForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            routed_scaling_factor=2.5,
            attention_bias=True,
            use_qk_norm=True,
        ),
        torch.bfloat16,
        dict(
            edit=add_prediction_layer,
            config=dict(rope_parameters=None, rope_theta=10000.0, partial_rotary_factor=0.5),
        ),
    ),
    # GLM-4.5-Air in small: no norms on heads, groups, head_dim left out; several shards.
    "glm4moe-groups-sharded": (
        Glm4MoeForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=64,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_attention_heads=4,
            num_key_value_heads=1,
            n_routed_experts=6,
            n_group=3,
            topk_group=2,
            num_experts_per_tok=3,
            first_k_dense_replace=0,
        ),
        torch.float16,
        dict(shard="40KB"),
    ),
    # Full precision, fused experts, two shared ones, a quarter of a head rotated and stretched, weights not normalised.
    "glm4moe-fused-shared2": (
        Glm4MoeForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=24,
            moe_intermediate_size=8,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            n_routed_experts=4,
            n_shared_experts=2,
            num_experts_per_tok=2,
            norm_topk_prob=False,
            tie_word_embeddings=True,
            rope_parameters=dict(
                rope_type="linear", rope_theta=1000.0, factor=2.0, partial_rotary_factor=0.25
            ),
        ),
        torch.float32,
        dict(edit=fuse_experts),
    ),
    # gpt-oss-20b in small, as it is published: experts in MXFP4, YaRN in the older spelling, a window in every other layer.
    "gptoss-mxfp4": (
        GptOssForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=64,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=150000.0,
                factor=4.0,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
                original_max_position_embeddings=16,
            ),
        ),
        torch.bfloat16,
        dict(
            edit=experts_to_mxfp4,
            config=dict(
                layer_types=None,
                swiglu_alpha=None,
                rope_parameters=None,
                rope_theta=150000.0,
                rope_scaling=dict(
                    rope_type="yarn",
                    factor=4.0,
                    beta_fast=32.0,
                    beta_slow=1.0,
                    truncate=False,
                    original_max_position_embeddings=16,
                ),
                quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]),
            ),
        ),
    ),
    # Plain floats as transformers saves them, layer kinds by name, three layers; several shards. Gates are wide enough to be clamped.
    "gptoss-bf16-sharded": (
        GptOssForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=40,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=3,
            num_experts_per_tok=1,
            sliding_window=11,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        ),
        torch.bfloat16,
        dict(shard="40KB"),
    ),
    # Full precision, no biases on attention, no scaling, tied.
    "gptoss-f32-plain-rope": (
        GptOssForCausalLM,
        dict(
            vocab_size=67,
            hidden_size=32,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=5,
            num_experts_per_tok=3,
            attention_bias=False,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        torch.float32,
        {},
    ),
}

# Smallest difference, relative to their spread, between the scores of the last expert that is chosen and the first that is not.
ROUTER_GAP = 1e-3


def make_golden(name, seed, model_class, arguments, dtype, storage):
    """Writes one golden folder."""
    folder = GOLDENS / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    defaults = {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": None}
    config = model_class.config_class(**{**defaults, **arguments})
    model = model_class(config).eval()
    randomise(model)
    model.to(dtype)
    for module in model.modules():
        # Kept in full precision, as it is published.
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    model.save_pretrained(folder, max_shard_size=storage.get("shard", "1GB"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    if "edit" in storage:
        rewrite_tensors(folder, lambda tensors: storage["edit"](tensors, model))
    rewrite_config(folder / "config.json", storage.get("config", {}))

    input_ids = torch.randint(config.vocab_size, (1, TOKENS))
    oracle = load_oracle(folder)
    if model_class is Gemma3ForCausalLM:
        # Computed in the type of the weights, as a model is that is not loaded as float32.
        embedding = oracle.model.embed_tokens
        embedding.embed_scale = embedding.embed_scale.to(dtype).to(torch.float32)
    logits, gap = run(oracle, input_ids)
    while gap < ROUTER_GAP:
        input_ids = torch.randint(config.vocab_size, (1, TOKENS))
        logits, gap = run(oracle, input_ids)
    save_file({"input_ids": input_ids[0].to(torch.int32), "logits": logits}, folder / "golden.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {size / 1024:.0f} KiB, logits of standard deviation {logits.std():.2f}, experts apart by {gap:.4f}")


def load_oracle(folder):
    """The folder as `transformers` reads it; experts in MXFP4 are decoded by its own function, without the packages that running them needs."""
    options = dict(dtype=torch.float32, attn_implementation="eager")
    config = AutoConfig.from_pretrained(folder)
    if not hasattr(config, "quantization_config"):
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    del config.quantization_config
    tensors = {name: value for file in folder.glob("model*.safetensors") for name, value in load_file(file).items()}
    for name in [name for name in tensors if name.endswith("_blocks")]:
        scales = tensors.pop(name.replace("_blocks", "_scales"))
        tensors[name.removesuffix("_blocks")] = convert_moe_packed_tensors(
            tensors.pop(name), scales, dtype=torch.float32
        )
    oracle = AutoModelForCausalLM.from_config(config, **options).eval()
    oracle.load_state_dict(tensors)
    return oracle


@torch.no_grad()
def run(oracle, input_ids):
    """Logits, and how close any token came to another expert or another group of experts."""
    gaps = [torch.tensor([torch.inf])]

    def watch(router, _, output):
        choice = output[0]
        if hasattr(router, "e_score_correction_bias"):
            choice = choice.sigmoid() + router.e_score_correction_bias
            groups = choice.view(len(choice), router.num_group, -1)
            scores = groups.topk(2).values.sum(-1).sort(descending=True)
            if router.topk_group < router.num_group:
                gaps.append(scores.values[:, router.topk_group - 1] - scores.values[:, router.topk_group])
            dropped = scores.indices[:, router.topk_group :, None].expand(-1, -1, groups.shape[-1])
            choice = groups.scatter(1, dropped, -torch.inf).flatten(1)
        if router.top_k < choice.shape[1]:
            values = choice.sort(descending=True).values
            gaps.append(values[:, router.top_k - 1] - values[:, router.top_k])

    routers = [module for module in oracle.modules() if type(module).__name__.lower().endswith("topkrouter")]
    hooks = [router.register_forward_hook(watch) for router in routers]
    logits = oracle(input_ids).logits[0]
    for hook in hooks:
        hook.remove()
    return logits, torch.cat(gaps).min().item()


@torch.no_grad()
def randomise(model):
    """Draws every parameter wide enough that a wrong norm, bias, head, expert or position shows in the logits."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            # Gemma stores the difference to 1.
            centre = 0.0 if isinstance(model, Gemma3ForCausalLM) else 1.0
            parameter.uniform_(centre - 0.5, centre + 0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.3)
        elif name.endswith(("embed_tokens.weight", "sinks")):
            parameter.normal_(std=1.0)
        elif ".experts." in name and isinstance(model, GptOssForCausalLM):
            # Transposed, and gates wide enough to be clamped.
            parameter.normal_(std=(4.0 if "gate_up" in name else 1.5) * parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.2)


def rewrite_tensors(folder, edit):
    """Puts what `edit` makes of all tensors into as many files as there are."""
    files = sorted(folder.glob("model*.safetensors"))
    tensors = edit({name: value for file in files for name, value in load_file(file).items()})
    names = sorted(tensors)
    each = -(-len(names) // len(files))
    weight_map = {}
    for index, file in enumerate(files):
        part = {name: tensors[name].contiguous() for name in names[index * each : (index + 1) * each]}
        save_file(part, file, metadata={"format": "pt"})
        weight_map |= {name: file.name for name in part}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")


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
