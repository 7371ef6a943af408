"""Makes FP8 folders that `transformers` (requirements.txt beside this file) decodes, for the tests of
marlin-checkpoint and marlin-model.

    make_fp8_goldens.py FOLDER

writes FOLDER/llama, FOLDER/qwen3moe and FOLDER/glm4moelite with a scale for each tile; FOLDER/partial, linears whose last
tiles are partial; and FOLDER/qwen3 with one scale a tensor or a row. `Fp8Dequantize` of `transformers` decodes whole tiles
only, so weights are filled up with zeros for it. The logits in golden.safetensors are those of the folder as `transformers`
loads it, where all tiles are whole; otherwise of the decoded weights.
"""

import sys
from pathlib import Path

import torch
from tiny_models import linears, model, save, stored, write
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

FP8 = torch.float8_e4m3fn


def encoded(weight, tile, scale_type):
    """Codes and scales of tiles, and what `transformers` makes of them."""
    (rows, cols), (r, c) = weight.shape, tile
    filled = pad(weight, (0, -cols % c, 0, -rows % r))
    tiles = filled.reshape(filled.shape[0] // r, r, filled.shape[1] // c, c)
    scales = (tiles.abs().amax((1, 3)) / 448).to(scale_type)
    codes = (tiles / scales.float()[:, None, :, None]).clamp(-448, 448).to(FP8).reshape(filled.shape)
    decoded = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.float32)
    return codes[:rows, :cols], scales, decoded[:rows, :cols]


def load(folder):
    """The folder as `transformers` decodes it."""
    quantization = FineGrainedFP8Config(dequantize=True)
    options = dict(dtype=torch.float32, attn_implementation="eager", quantization_config=quantization)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def tiles(folder, shape, oracle):
    config, tensors = stored(model(shape))
    expected = dict(tensors)
    for name in linears(tensors):
        codes, scales, expected[f"{name}.weight"] = encoded(tensors[f"{name}.weight"], (16, 16), torch.float32)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16],
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    }
    save(folder, config, tensors, expected, oracle)


def partial(folder):
    torch.manual_seed(4)
    shapes = {"kv_a_proj_with_mqa": (144, 160), "q_b_proj": (136, 24), "o_proj": (7, 130)}
    tensors, expected = {}, {}
    for index, (name, shape) in enumerate(shapes.items()):
        name = f"model.layers.0.self_attn.{name}"
        scale_type = torch.bfloat16 if index == 1 else torch.float32
        codes, scales, expected[f"{name}.weight"] = encoded(torch.randn(shape), (128, 128), scale_type)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    write(folder, {"model_type": "test", "quantization_config": quantization}, tensors, expected)


def rows(folder, shape):
    config, tensors = stored(model(shape))
    expected = dict(tensors)
    for index, name in enumerate(linears(tensors)):
        weight = tensors[f"{name}.weight"]
        tile = (1, weight.shape[1]) if index % 2 else tuple(weight.shape)
        codes, scales, expected[f"{name}.weight"] = encoded(weight, tile, torch.float32)
        scales = scales if index % 2 else scales.reshape(())
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scales, f"{name}.input_scale": torch.ones(1)}
    said = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    config["quantization_config"] = said
    save(folder, config, tensors, expected)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    goldens = Path(sys.argv[1])
    tiles(goldens / "llama", "llama", load)
    rows(goldens / "qwen3", "qwen3")
    tiles(goldens / "qwen3moe", "qwen3moe", load)
    tiles(goldens / "glm4moelite", "glm4moelite", None)
    partial(goldens / "partial")
