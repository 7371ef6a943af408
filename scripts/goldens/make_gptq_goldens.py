"""Quantises tiny models with the Python package `gptqmodel` (requirements.txt beside this file), for the tests
of marlin-checkpoint and marlin-model.

    make_gptq_goldens.py FOLDER

writes FOLDER/v1, a Qwen3 in the first version of the layout, and FOLDER/v2, one with experts in the second.
Weights are rounded to nearest and packed by the package's `pack`; what it decodes them to, with scales in
f32, stands in expected.safetensors beside them.
"""

import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from tiny_models import linears, model, save

CASES = {  # what a name ends with: bits, group, symmetric, act-order, bias
    "q_proj": (4, 16, True, True, False),
    "k_proj": (2, 16, False, False, False),
    "v_proj": (4, 16, False, False, False),
    "o_proj": (3, 16, False, True, False),
    "gate_proj": (8, 16, False, False, False),
    "up_proj": (3, -1, True, False, False),
    "down_proj": (4, 16, True, False, False),
}
LM_HEAD = (8, 16, True, False, False)


def quantised(weight, bits, group, symmetric, act_order, bias):
    """The package's module."""
    rows, cols = weight.shape
    size = cols if group == -1 else group
    order = torch.randperm(cols) if act_order else torch.arange(cols)
    g_idx = torch.empty(cols, dtype=torch.int32)
    g_idx[order] = torch.arange(cols, dtype=torch.int32) // size
    largest = 2**bits - 1
    scales, zeros = torch.empty(rows, cols // size), torch.empty(rows, cols // size)
    for index in range(cols // size):
        values = weight[:, g_idx == index]
        if symmetric:
            scales[:, index], zeros[:, index] = 2 * values.abs().amax(1) / largest, 2 ** (bits - 1)
        else:
            low, high = values.amin(1), values.amax(1)
            scales[:, index] = (high - low) / largest
            zeros[:, index] = (-low / scales[:, index]).round().clamp(0, largest)
            zeros[:: 3, index] = 0  # which version 1 stores as -1
    scales = scales.half().float()
    linear = torch.nn.Linear(cols, rows, bias=bias)
    linear.weight.data = weight
    module = TorchLinear(
        bits=bits, group_size=group, sym=symmetric, desc_act=act_order, in_features=cols, out_features=rows, bias=bias,
        pack_dtype=torch.int32, dtype=torch.float16, register_buffers=True,
    )
    module.pack_original(linear, scales, zeros, g_idx)
    return module


def decoded(module):
    module.post_init()
    module.scales = module.scales.float()
    return module.dequantize_weight().T.contiguous()


def golden(folder, version, moe):
    config, tensors = model(moe)
    expected = dict(tensors)
    dynamic = {}
    for name in [*linears(tensors), "lm_head"]:
        case = LM_HEAD if name == "lm_head" else CASES[name.rsplit(".", 1)[1]]
        bits, group = case[:2]
        if (bits, group) != (4, 16):
            pattern = name.replace(".", r"\.") if name == "lm_head" else rf".*\.{name.rsplit('.', 1)[1]}$"
            dynamic[f"+:{pattern}"] = {"bits": bits, "group_size": group}
        module = quantised(tensors.pop(f"{name}.weight"), *case)
        stored = {part: module.state_dict()[part].clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
        if version == 1:
            v2 = module.qzeros.clone()
            convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
            stored["qzeros"] = module.qzeros.clone()
            convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
            assert torch.equal(module.qzeros, v2)
        if moe and name.endswith("down_proj"):
            del stored["g_idx"]  # as packages write that leave a trivial one out
        tensors |= {f"{name}.{part}": tensor for part, tensor in stored.items()}
        expected[f"{name}.weight"] = decoded(module)
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True, "lm_head": True,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "pack_dtype": "int32", "dynamic": dynamic,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    save(folder, config, tensors, expected)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    golden(Path(sys.argv[1], "v1"), 1, False)
    golden(Path(sys.argv[1], "v2"), 2, True)
