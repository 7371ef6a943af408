"""Quantises tiny models with the Python package `gptqmodel` (requirements.txt beside this file), for the tests
of marlin-checkpoint and marlin-model.

    make_gptq_goldens.py FOLDER

writes FOLDER/llama and FOLDER/glm4moelite, which the package calibrates, quantises and saves. Of FOLDER/qwen3, in the
first version of the layout, and FOLDER/qwen3moe, in the second, every linear has other settings: weights are rounded to
nearest and packed by the package's `pack`. What the package decodes them to, with scales in f32, stands in
expected.safetensors beside them, and the logits of `transformers` in golden.safetensors.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "GPTQMODEL_CPU_WORKERS": "2"}

import torch
from defuser.modeling.unfused_moe.glm4_moe_lite import LinearGlm4MoeLiteMoE
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
from safetensors.torch import load_file
from tiny_models import add_expected, calibration, linears, model, save, save_source, stored

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


def packed(folder, version, shape):
    """Every linear with settings of its own, as cases go."""
    config, tensors = stored(model(shape))
    expected = dict(tensors)
    dynamic = {}
    for name in [*linears(tensors), "lm_head"]:
        case = LM_HEAD if name == "lm_head" else CASES[name.rsplit(".", 1)[1]]
        bits, group = case[:2]
        if (bits, group) != (4, 16):
            pattern = name.replace(".", r"\.") if name == "lm_head" else rf".*\.{name.rsplit('.', 1)[1]}$"
            dynamic[f"+:{pattern}"] = {"bits": bits, "group_size": group}
        module = quantised(tensors.pop(f"{name}.weight"), *case)
        parts = {part: module.state_dict()[part].clone() for part in ("qweight", "qzeros", "scales", "g_idx")}
        if version == 1:
            v2 = module.qzeros.clone()
            convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
            parts["qzeros"] = module.qzeros.clone()
            convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
            assert torch.equal(module.qzeros, v2)
        if version == 2 and name.endswith("down_proj"):
            del parts["g_idx"]  # as packages write that leave a trivial one out
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        expected[f"{name}.weight"] = decoded(module)
    config["quantization_config"] = {
        "quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": True, "lm_head": True,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "pack_dtype": "int32", "dynamic": dynamic,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    save(folder, config, tensors, expected)


# Its blocks of experts, which the package puts in the place of those of `transformers`, take what routers gave before 5.20.
LinearGlm4MoeLiteMoE.route_tokens_to_experts = lambda _, routed: (routed[2], routed[1])

CALIBRATED = {
    "llama": dict(sym=False, desc_act=True),
    "glm4moelite": dict(
        sym=True, desc_act=False, dynamic={r"+:.*\.kv_b_proj$": {"bits": 8, "group_size": 32}, r"-:.*\.q_a_proj$": {}}
    ),
}


def calibrated(folder, shape):
    """What the package makes of a model by itself."""
    config = QuantizeConfig(bits=4, group_size=16, offload_to_disk=False, **CALIBRATED[shape])
    with tempfile.TemporaryDirectory() as source:
        save_source(model(shape), source)
        loaded = GPTQModel.load(source, config, device="cpu", dtype=torch.float32)
        texts = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in calibration()]
        loaded.quantize(texts, batch_size=1)
        loaded.save(str(folder))
    runs = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    add_expected(folder, reloaded(folder))
    golden = load_file(folder / "golden.safetensors")
    found = runs(golden["input_ids"][None].long()).logits[0].float()
    error = (found - golden["logits"]).norm() / golden["logits"].norm()
    print(f"the package itself computes in f16: {error:.4f} from these logits")
    assert error < 0.005


def reloaded(folder):
    """The tensors of a folder as the package decodes them."""
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    config = config["quantization_config"]
    assert config["checkpoint_format"] == "gptq"
    rules = QuantizeConfig.from_pretrained(str(folder))
    expected = {}
    for name in [name for name in tensors if name.endswith(".qweight")]:
        module = name.removesuffix(".qweight")
        parts = {part: tensors.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        bits, group = (rules.dynamic_get(module, key, config[key]) for key in ("bits", "group_size"))
        linear = TorchLinear(
            bits=bits, group_size=group, sym=config["sym"], desc_act=config["desc_act"], in_features=len(parts["g_idx"]),
            out_features=parts["scales"].shape[1], bias=False, pack_dtype=torch.int32, dtype=torch.float16,
            register_buffers=True,
        )
        linear.load_state_dict(parts)
        convert_gptq_v1_to_v2_format_module(linear, bits, torch.int32)
        expected[f"{module}.weight"] = decoded(linear)
    return tensors | expected


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    goldens = Path(sys.argv[1])
    packed(goldens / "qwen3", 1, "qwen3")
    packed(goldens / "qwen3moe", 2, "qwen3moe")
    for shape in CALIBRATED:
        calibrated(goldens / shape, shape)
