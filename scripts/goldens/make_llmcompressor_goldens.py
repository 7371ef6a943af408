"""Quantises tiny models with the Python packages `llmcompressor` and `compressed-tensors` (requirements.txt beside this
file), for the tests of marlin-checkpoint and marlin-model.

    make_llmcompressor_goldens.py FOLDER

writes FOLDER/SHAPE, which the packages quantise and save. What they decode the weights to in f32 stands in
expected.safetensors beside them, and the logits of `transformers` in golden.safetensors: of the folder as it loads it,
or, where it decodes in another type (NVFP4) or cannot load the experts, of the decoded weights.
"""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file
from tiny_models import add_expected, model, save_source
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

GROUP = 16
CASES = {  # shape: what modules have which scheme
    "llama": {"Linear": "W4A16_ASYM"},
    "qwen3": {"Linear": "FP8_DYNAMIC"},
    "qwen3moe": {"Linear": "NVFP4A16"},
    "glm4moelite": {r"re:.*self_attn\..*_proj.*": "FP8_BLOCK", r"re:.*mlp\..*_proj$": "W4A16"},
}


def scheme(name, target):
    made = preset_name_to_scheme(name, [target])
    if made.weights.group_size:
        made.weights.group_size = GROUP
    if made.weights.block_structure:
        made.weights.block_structure = [GROUP, GROUP]
    return made


def golden(folder, shape):
    shutil.rmtree(folder, ignore_errors=True)
    groups = {f"group_{i}": scheme(name, target) for i, (target, name) in enumerate(CASES[shape].items())}
    recipe = QuantizationModifier(config_groups=groups, ignore=["lm_head", r"re:.*mlp\.gate$"])
    with tempfile.TemporaryDirectory() as source:
        save_source(model(shape), source)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        oneshot(model=loaded, recipe=recipe)
        loaded.save_pretrained(folder, save_compressed=True)
    add_expected(folder, decoded(folder), None if "moe" in shape else load)


def load(folder):
    """The folder as `transformers` decodes it."""
    options = dict(dtype=torch.float32, attn_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CompressedTensorsConfig(dequantize=True), **options)


def decoded(folder):
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    expected = {}
    for module in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
        own = [name for name in tensors if name.startswith(f"{module}.")]
        state = {name.removeprefix(f"{module}."): tensors.pop(name) for name in own}
        [group] = (group for group in groups if len(groups) == 1 or is_of(module, group))
        if group.format == "nvfp4-pack-quantized":  # its `decompress` rounds to bfloat16
            packed = state["weight_packed"]
            codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, torch.float32)
            weight = dequantize(
                codes, state["weight_scale"].float(), args=group.weights, dtype=torch.float32,
                global_scale=state["weight_global_scale"],
            )
        else:
            weight = BaseCompressor.get_value_from_registry(group.format).decompress(state, group)["weight"]
        assert weight.dtype == torch.float32
        expected[f"{module}.weight"] = weight
    return tensors | expected


def is_of(module, group):
    return any(re.match(target.removeprefix("re:"), module) for target in group.targets)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for shape in CASES:
        golden(Path(sys.argv[1], shape), shape)
