"""Small models of Transformers for tests, and what they are compared with."""

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

from metal_marlin import MetalQuantizedLinear, MetalQuantizedMoE

_COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, attention_bias=True, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**_COMMON, head_dim=16, tie_word_embeddings=True),
    "gemma3_text": Gemma3TextConfig(
        **_COMMON, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_COMMON, head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True
    ),
    "mixtral": MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
    "glm4_moe_lite": Glm4MoeLiteConfig(
        **{**_COMMON, "num_key_value_heads": 4},
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        mlp_layer_types=["dense", "sparse"],
        n_group=1,
        topk_group=1,
    ),
    "gpt_oss": GptOssConfig(
        **_COMMON,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
}

MOE = ("qwen3_moe", "mixtral", "glm4_moe_lite", "gpt_oss")


def tiny_model(family: str) -> PreTrainedModel:
    """A random model whose logits are far enough apart for greedy tokens to mean something."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            if name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def trained_model_folder(name: str) -> Path:
    """A trained model of the folder that METAL_MARLIN_MODELS names, or the test is skipped."""
    models = os.environ.get("METAL_MARLIN_MODELS")
    if not models:
        pytest.skip("METAL_MARLIN_MODELS is not set: no trained models")
    folder = Path(models) / name
    if not folder.is_dir():
        pytest.skip(f"METAL_MARLIN_MODELS has no {name}")
    return folder


def dequantized_like(quantized: PreTrainedModel, original: PreTrainedModel) -> PreTrainedModel:
    """The original in torch, with the weights that the quantised model computes with."""
    reference = copy.deepcopy(original)
    for name, module in quantized.named_modules():
        if isinstance(module, MetalQuantizedLinear):
            reference.set_submodule(name, module.to_linear(torch.float32))
        elif isinstance(module, MetalQuantizedMoE):
            reference.get_submodule(name).load_state_dict(module.dequantize(torch.float32))
    return reference.requires_grad_(False)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Root of the squared error over that of the squares."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def token_ids(model: PreTrainedModel, rows: int = 2, length: int = 12) -> torch.Tensor:
    """Some tokens, the same for the same model."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (rows, length), generator=generator)


def assert_same_tokens(quantized, reference, **inputs):
    """Greedy tokens agree, until the reference itself can hardly tell which of two it would choose."""
    options = {
        "max_new_tokens": 24,
        "do_sample": False,
        "use_cache": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    found = quantized.generate(**inputs, **options)
    wanted = reference.generate(**inputs, **options)
    start = inputs["input_ids"].shape[1]
    compared = 0
    for row in range(len(wanted.sequences)):
        for step, logits in enumerate(wanted.logits):
            best, second = logits[row].topk(2).values
            if best - second < 2e-3 * logits[row].std():
                break
            assert found.sequences[row, start + step] == wanted.sequences[row, start + step], f"row {row}, step {step}"
            compared += 1
    assert compared >= 12
