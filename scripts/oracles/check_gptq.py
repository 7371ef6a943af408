"""Holds the GPTQ layout against the Python package `gptqmodel` (gptq-requirements.txt beside this file).

    check_gptq.py METAL_MARLIN DEQUANTIZE MODEL

quantises MODEL in every format that the layout takes with the program METAL_MARLIN, decodes the folders with the
package's own torch code, and compares all weights for equality with those of the same quantisation in the layout
metal-marlin, as DEQUANTIZE (the example of marlin-checkpoint) decodes it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from gptqmodel import QuantizeConfig
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors.torch import load_file

FORMATS = [("int4-sym", "32"), ("int4-sym", "row"), ("int4", "32"), ("int4", "row"), ("int8", "64"), ("int8", "row")]


def quantize(program, model, out, format, group, layout):
    # Embedding and head are kept in both, so that the same matrices are packed.
    options = ["--format", format, "--group-size", group, "--layout", layout, "--embedding-format", "bf16", "--json"]
    subprocess.run([program, "quantize", model, out, "--method", "mse", *options], check=True, stdout=subprocess.DEVNULL)


def decode(tensors, name, config):
    """What the package computes with, scales in float32."""
    stored = {part: tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    bits, rows, cols = config["bits"], stored["scales"].shape[1], len(stored["g_idx"])
    module = TorchLinear(
        bits=bits, group_size=config["group_size"], sym=config["sym"], desc_act=config["desc_act"], in_features=cols,
        out_features=rows, bias=False, pack_dtype=torch.int32, dtype=torch.float16, register_buffers=True,
    )
    module.load_state_dict(stored)
    if config["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
    module.post_init()
    module.scales = module.scales.float()
    return module.dequantize_weight().T


def main(program, dequantize, model):
    for format, group in FORMATS:
        with tempfile.TemporaryDirectory() as scratch:
            packed, ours, dense = (Path(scratch, name) for name in ("packed", "ours", "dense"))
            quantize(program, model, packed, format, group, "gptq")
            quantize(program, model, ours, format, group, "metal-marlin")
            subprocess.run([dequantize, ours, dense], check=True)
            config = json.loads((packed / "config.json").read_text())["quantization_config"]
            loaded = QuantizeConfig.from_pretrained(str(packed))
            assert (loaded.bits, loaded.group_size, loaded.sym, loaded.desc_act) == tuple(
                config[key] for key in ("bits", "group_size", "sym", "desc_act")
            )
            tensors, wanted = load_file(packed / "model.safetensors"), load_file(dense / "model.safetensors")
            names = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
            assert names and all(name.startswith("model.layers.") for name in names)
            for name in names:
                found = decode(tensors, name, config)
                assert torch.equal(found, wanted[f"{name}.weight"]), f"{format} {group}: {name}"
            print(f"{format:9} {group:4} {len(names)} linears: the package decodes the same values ({loaded.format})")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
