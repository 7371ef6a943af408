"""Quantises tiny models with the Python package `nvidia-modelopt` (requirements.txt beside this file), for the
tests of marlin-checkpoint and marlin-model.

    make_modelopt_goldens.py FOLDER

writes FOLDER/nvfp4, a Qwen3 with experts, and FOLDER/fp8, a Qwen3 whose config stands in
hf_quant_config.json. The package's tensors quantise the weights and decode them in f32, which stands in
expected.safetensors beside them.
"""

import json
import sys
from pathlib import Path

import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from tiny_models import linears, model, save

GROUP = 16


def nvfp4(folder):
    config, tensors = model(True)
    expected = dict(tensors)
    for name in linears(tensors):
        made, scale, scale_2 = NVFP4QTensor.quantize(tensors[f"{name}.weight"], GROUP)
        expected[f"{name}.weight"] = made.dequantize(
            dtype=torch.float32, scale=scale, double_scale=scale_2, block_sizes={-1: GROUP}
        )
        tensors |= {
            f"{name}.weight": made._quantized_data,
            f"{name}.weight_scale": scale,
            f"{name}.weight_scale_2": scale_2,
            f"{name}.input_scale": torch.tensor(0.5),
        }
    config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.47.0"},
        "group_size": GROUP, "ignore": ["lm_head", "model.layers.0.mlp.gate"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
    }
    attention = "model.layers.0.self_attn"
    scales = {f"{attention}.k_proj.k_scale": torch.tensor(1.0), f"{attention}.v_proj.v_scale": torch.tensor(1.0)}
    save(folder, config, tensors | scales, expected)


def fp8(folder):
    config, tensors = model(False)
    expected = dict(tensors)
    for name in linears(tensors):
        made, scale = FP8QTensor.quantize(tensors[f"{name}.weight"])
        expected[f"{name}.weight"] = made.dequantize(dtype=torch.float32, scale=scale)
        tensors |= {f"{name}.weight": made._quantized_data, f"{name}.weight_scale": scale.reshape(())}
    save(folder, config, tensors, expected)
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    said = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    Path(folder, "hf_quant_config.json").write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for make in (nvfp4, fp8):
        make(Path(sys.argv[1], make.__name__))
