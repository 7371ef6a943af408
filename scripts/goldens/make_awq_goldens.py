"""Quantises tiny models with the Python package `autoawq` (requirements.txt beside this file), for the tests of
marlin-checkpoint and marlin-model.

    make_awq_goldens.py FOLDER

writes FOLDER/llama, FOLDER/qwen3, FOLDER/qwen3moe and FOLDER/glm4moelite, in version `gemm` of the layout, and
FOLDER/gemv-llama. Weights are rounded to nearest and packed by the package's `WQLinear_GEMM` and `WQLinear_GEMV`; what its
`dequantize_gemm` makes of them, with scales in f32, stands in expected.safetensors beside them, and the logits of
`transformers` in golden.safetensors. For `gemv` the package has only kernels: its `unpack_awq` gives the codes.
"""

import os
import sys
import types
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}

import torch
from safetensors.torch import load_file
from tiny_models import SHAPES, linears, model, save, stored
from transformers import AutoModelForCausalLM

# The package itself needs models that `transformers` no longer has; its modules do not.
for name in ("awq", "awq.modules", "awq.modules.linear"):
    package = types.ModuleType(name)
    package.__path__ = [str(Path(entry, *name.split("."))) for entry in sys.path if Path(entry, "awq").is_dir()]
    sys.modules[name] = package
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.modules.linear.gemv import WQLinear_GEMV
from awq.utils.packing_utils import dequantize_gemm, unpack_awq

GROUPS = {"gemm": 16, "gemv": 32}


def quantised(weight, symmetric, version):
    """The package's module."""
    (rows, cols), group = weight.shape, GROUPS[version]
    groups = weight.reshape(rows, cols // group, group)
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
    if version == "gemv":
        return WQLinear_GEMV.from_linear(linear, 4, group, scales=scales, zeros=zeros)
    return WQLinear_GEMM.from_linear(linear, 4, group, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())


def decoded(module, version):
    """Its weights `[rows, columns]`, with scales in f32."""
    scales, group = module.scales.float(), GROUPS[version]
    if version == "gemm":
        return dequantize_gemm(module.qweight, module.qzeros, scales, 4, group).T
    codes, zeros = (unpacked & 15 for unpacked in unpack_awq(module.qweight, module.qzeros, 4))
    groups = codes.shape[1] // group
    zeros, scales = (values[:, :groups].repeat_interleave(group, dim=1) for values in (zeros, scales))
    return (codes - zeros) * scales


def golden(folder, shape, version):
    # The package packs multiples of 32 rows.
    rows = dict(qk_rope_head_dim=32) if shape == "glm4moelite" else dict(num_key_value_heads=2)
    config, tensors = stored(model(shape, **rows))
    expected = dict(tensors)
    for name in linears(tensors):
        module = quantised(tensors.pop(f"{name}.weight"), name.endswith("o_proj"), version)
        tensors |= {f"{name}.{part}": getattr(module, part) for part in ("qweight", "qzeros", "scales")}
        expected[f"{name}.weight"] = decoded(module, version)
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": GROUPS[version], "zero_point": True, "version": version,
        "modules_to_not_convert": ["mlp.gate"] if "moe" in shape else None,
    }
    save(folder, config, tensors, expected)
    if version == "gemm" and "moe" not in shape:  # of experts, `transformers` does not find the packed ones
        assert_transformers_agrees(folder)


def assert_transformers_agrees(folder):
    """It runs the folder itself in f16 only."""
    golden = load_file(folder / "golden.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, attn_implementation="eager").eval()
    found = loaded(golden["input_ids"][None].long()).logits[0].float()
    error = (found - golden["logits"]).norm() / golden["logits"].norm()
    print(f"transformers itself computes in f16: {error:.4f} from these logits")
    assert error < 0.01


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for shape in SHAPES:
        golden(Path(sys.argv[1], shape), shape, "gemm")
    golden(Path(sys.argv[1], "gemv-llama"), "llama", "gemv")
