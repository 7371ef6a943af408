"""Quantises tiny models with the Python package `nvidia-modelopt` (requirements.txt beside this file), for the
tests of marlin-checkpoint and marlin-model.

    make_modelopt_goldens.py FOLDER

writes FOLDER/nvfp4-SHAPE and FOLDER/fp8-SHAPE, which the package calibrates, quantises and exports. Its tensors decode
the folders in f32, which stands in expected.safetensors beside them, and the logits of `transformers` in
golden.safetensors.
"""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import modelopt.torch.quantization as quantization
import torch
from make_model_goldens import rewrite_config
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from safetensors.torch import load_file
from tiny_models import add_expected, calibration, model

GROUP = 16
CASES = {  # format: settings of the package, shapes
    "nvfp4": (quantization.NVFP4_DEFAULT_CFG, ["llama", "qwen3", "qwen3moe", "glm4moelite"]),
    "fp8": (quantization.FP8_DEFAULT_CFG, ["qwen3", "glm4moelite"]),
}


def golden(folder, settings, shape):
    made = model(shape).to(torch.bfloat16)
    if shape == "qwen3moe":  # with scales of the KV cache, too
        settings = quantization.update_quant_cfg_with_kv_cache_quant(settings, quantization.FP8_KV_CFG["quant_cfg"])
    made = quantization.quantize(made, settings, lambda model: [model(ids[None]) for ids in calibration()])
    export_hf_checkpoint(made, export_dir=folder)
    if folder.name == "fp8-qwen3":  # as older releases wrote it, with the settings in hf_quant_config.json alone
        rewrite_config(folder / "config.json", {"quantization_config": None})
    else:
        (folder / "hf_quant_config.json").unlink()
    add_expected(folder, decoded(load_file(folder / "model.safetensors")))


def decoded(tensors):
    expected = {}
    for name, value in tensors.items():
        module, _, part = name.rpartition(".")
        if f"{module}.weight_scale" not in tensors and part not in ("k_scale", "v_scale"):
            expected[name] = value
        elif part == "weight" and value.dtype == torch.uint8:
            shape = torch.Size([value.shape[0], value.shape[1] * 2])
            expected[name] = NVFP4QTensor(shape, torch.float32, value).dequantize(
                dtype=torch.float32, scale=tensors[f"{module}.weight_scale"],
                double_scale=tensors[f"{module}.weight_scale_2"], block_sizes={-1: GROUP},
            )
        elif part == "weight":
            made = FP8QTensor(value.shape, torch.float32, value)
            expected[name] = made.dequantize(dtype=torch.float32, scale=tensors[f"{module}.weight_scale"])
    return expected


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for format, (settings, shapes) in CASES.items():
        for shape in shapes:
            golden(Path(sys.argv[1], f"{format}-{shape}"), settings, shape)
