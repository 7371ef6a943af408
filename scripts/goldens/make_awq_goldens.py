"""Quantises tiny models with the Python package `autoawq` (requirements.txt beside this file), for the tests of
marlin-checkpoint and marlin-model.

    make_awq_goldens.py FOLDER

writes FOLDER/llama, FOLDER/qwen3, FOLDER/qwen3moe and FOLDER/glm4moelite. Weights are rounded to nearest and packed by
the package's `WQLinear_GEMM`; what its `dequantize_gemm` makes of them, with scales in f32, stands in
expected.safetensors beside them, and the logits of `transformers` in golden.safetensors.
"""

import sys
import types
from pathlib import Path

import torch
from tiny_models import SHAPES, linears, model, save, stored

# The package itself needs models that `transformers` no longer has; its modules do not.
for name in ("awq", "awq.modules", "awq.modules.linear"):
    package = types.ModuleType(name)
    package.__path__ = [str(Path(entry, *name.split("."))) for entry in sys.path if Path(entry, "awq").is_dir()]
    sys.modules[name] = package
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm

GROUP = 16


def quantised(weight, symmetric):
    rows, cols = weight.shape
    groups = weight.reshape(rows, cols // GROUP, GROUP)
    if symmetric:
        scales = groups.abs().amax(-1) / 7
        zeros = torch.full_like(scales, 8)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = (high - low) / 15
        zeros = (-low / scales).round().clamp(0, 15)
    linear = torch.nn.Linear(cols, rows, bias=False)
    # The package does not clamp codes.
    scale, zero = scales[..., None], zeros[..., None]
    codes = ((groups / scale).round() + zero).clamp(0, 15)
    linear.weight.data = ((codes - zero) * scale).reshape(rows, cols)
    return WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())


def golden(folder, shape):
    # The package packs multiples of 32 rows.
    rows = dict(qk_rope_head_dim=32) if shape == "glm4moelite" else dict(num_key_value_heads=2)
    config, tensors = stored(model(shape, **rows))
    expected = dict(tensors)
    for name in linears(tensors):
        module = quantised(tensors.pop(f"{name}.weight"), symmetric=name.endswith("o_proj"))
        tensors |= {f"{name}.{part}": getattr(module, part) for part in ("qweight", "qzeros", "scales")}
        decoded = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, GROUP)
        expected[f"{name}.weight"] = decoded.T
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["mlp.gate"] if "moe" in shape else None,
    }
    save(folder, config, tensors, expected)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for shape in SHAPES:
        golden(Path(sys.argv[1], shape), shape)
