"""Holds the compressed-tensors layout against the Python package of that name (requirements.txt beside this file).

    check_compressed_tensors.py check METAL_MARLIN DEQUANTIZE MODEL
        quantises MODEL in every format with the program METAL_MARLIN, decodes the folders with the package, with
        `transformers` and with DEQUANTIZE (the example of marlin-checkpoint), and compares all weights for equality

    check_compressed_tensors.py goldens FOLDER
        writes a folder made by the package, with the weights it decodes to, for the tests of marlin-checkpoint
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file, save_file

FORMATS = [
    ("int4-sym", "32"),
    ("int4-sym", "row"),
    ("int4", "32"),
    ("int4", "row"),
    ("int8", "32"),
    ("int8", "row"),
    ("fp8", "row"),
    ("fp8", "tensor"),
    ("fp8", "128x128"),
    ("mxfp4", "32"),
    ("nvfp4", "16"),
]


def same(found, wanted):
    """Equal values; a zero may have either sign."""
    return found.shape == wanted.shape and torch.equal(found.float(), wanted)


def modules(tensors):
    return sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale"))


def decompress(tensors, module, scheme, storage):
    prefix = module + "."
    state = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return BaseCompressor.get_value_from_registry(storage).decompress(state, scheme)["weight"]


def check(program, decode, model):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    for format, group in FORMATS:
        with tempfile.TemporaryDirectory() as scratch:
            packed, dense = Path(scratch, "packed"), Path(scratch, "dense")
            layout = ["--layout", "compressed-tensors", "--format", format, "--group-size", group, "--json"]
            subprocess.run([program, "quantize", model, packed, "--method", "mse", *layout], check=True, stdout=subprocess.DEVNULL)
            subprocess.run([decode, packed, dense], check=True)
            tensors, wanted = load_file(packed / "model.safetensors"), load_file(dense / "model.safetensors")
            config = QuantizationConfig.model_validate(json.load(open(packed / "config.json"))["quantization_config"])
            [scheme] = config.config_groups.values()
            names = modules(tensors)
            assert names and all(name.startswith("model.layers.") for name in names)
            for name in names:
                found = decompress(tensors, name, scheme, scheme.format)
                assert same(found, wanted[f"{name}.weight"]), f"{format} {group}: {name}"

            options = CompressedTensorsConfig(dequantize=True)
            loaded = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32, quantization_config=options)
            for name in names:
                assert same(loaded.get_parameter(f"{name}.weight"), wanted[f"{name}.weight"]), f"transformers {name}"
            print(f"{format:9} {group:8} {len(names)} linears: the package and transformers decode the same values")


def goldens(folder):
    torch.manual_seed(1)
    args = lambda bits, kind, **rest: QuantizationArgs(num_bits=bits, type=kind, **rest)
    cases = {  # module: (format, arguments, shape, type of the scales)
        "a.int4_sym_group": ("pack-quantized", args(4, "int", strategy="group", group_size=16), (12, 64), torch.bfloat16),
        "a.int4_sym_row_odd": ("pack-quantized", args(4, "int", strategy="channel"), (5, 37), torch.float16),
        "a.int4_asym_group": ("pack-quantized", args(4, "int", strategy="group", group_size=32, symmetric=False), (13, 96), torch.float32),
        "a.int4_asym_row": ("pack-quantized", args(4, "int", strategy="channel", symmetric=False), (9, 40), torch.bfloat16),
        "a.int3_asym_group": ("pack-quantized", args(3, "int", strategy="group", group_size=16, symmetric=False), (11, 48), torch.float16),
        "a.int8_group": ("pack-quantized", args(8, "int", strategy="group", group_size=32), (6, 64), torch.bfloat16),
        "b.int8_row": ("int-quantized", args(8, "int", strategy="channel"), (7, 33), torch.float32),
        "b.int8_asym_row": ("int-quantized", args(8, "int", strategy="channel", symmetric=False), (7, 33), torch.bfloat16),
        "b.int8_tensor": ("naive-quantized", args(8, "int", strategy="tensor"), (4, 20), torch.float32),
        "b.fp8_tensor": ("float-quantized", args(8, "float", strategy="tensor"), (4, 20), torch.bfloat16),
        "b.fp8_row": ("float-quantized", args(8, "float", strategy="channel"), (6, 24), torch.float32),
        "b.fp8_block": ("naive-quantized", args(8, "float", strategy="block", block_structure=[8, 16]), (12, 40), torch.float32),
        "c.nvfp4": ("nvfp4-pack-quantized", args(4, "float", strategy="tensor_group", group_size=16), (8, 64), torch.float32),
        "c.mxfp4": ("mxfp4-pack-quantized", args(4, "float", strategy="group", group_size=32), (8, 64), torch.float32),
        "c.mxfp8": ("mxfp8-quantized", args(8, "float", strategy="group", group_size=32), (5, 64), torch.float32),
        "a.int5_asym_group": ("pack-quantized", args(5, "int", strategy="group", group_size=16, symmetric=False), (9, 48), torch.float32),
        "a.int6_row": ("pack-quantized", args(6, "int", strategy="channel"), (4, 37), torch.float16),
        "a.int7_asym_row": ("pack-quantized", args(7, "int", strategy="channel", symmetric=False), (7, 41), torch.float32),
    }
    tensors, expected, groups = {}, {}, {}
    for index, (module, (storage, weights, (rows, cols), scale_type)) in enumerate(cases.items()):
        weight = torch.randn(rows, cols)
        target = f"re:.*{module[2:]}$" if index % 2 else module
        scheme = QuantizationScheme(targets=[target], weights=weights, format=storage)
        groups[f"group_{index}"] = scheme
        state = {"weight": weight, **scales(weight, weights, storage, scale_type)}
        state = BaseCompressor.get_value_from_registry(storage).compress(state, scheme)
        tensors |= {f"{module}.{name}": t.contiguous() for name, t in state.items()}
        # The package computes in the type of the scales; in f32 no product is rounded.
        exact = {n: t.float() if n == "weight_scale" and t.dtype in (torch.bfloat16, torch.float16) else t for n, t in state.items()}
        decoded = BaseCompressor.get_value_from_registry(storage).decompress(exact, scheme)["weight"]
        if storage == "nvfp4-pack-quantized":  # its decompress rounds to bfloat16
            codes = unpack_fp4_from_uint8(state["weight_packed"], rows, cols, torch.float32)
            inverse = state["weight_global_scale"]
            decoded = dequantize(codes, state["weight_scale"].float(), args=weights, dtype=torch.float32, global_scale=inverse)
        expected[f"{module}.weight"] = decoded.float().contiguous()
    tensors["lm_head.weight"] = expected["lm_head.weight"] = torch.randn(3, 8)
    config = QuantizationConfig(config_groups=groups, format="mixed-precision", quantization_status="compressed", ignore=["lm_head"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(expected, folder / "expected.safetensors")
    text = json.dumps({"model_type": "test", "quantization_config": config.model_dump(mode="json")}, indent=1)
    (folder / "config.json").write_text(text + "\n")


def scales(weight, args, storage, scale_type):
    """Round-to-nearest scales and zero points."""
    rows, cols = weight.shape
    if args.strategy == "block":
        (r, c) = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -cols % c, 0, -rows % r))
        runs = padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c).transpose(1, 2).flatten(2)
    elif args.strategy == "tensor":
        runs = weight.reshape(1, -1)
    else:
        runs = weight.reshape(rows, -1, args.group_size or cols)
    low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
    largest = {("int", 8): 127, ("int", 6): 31, ("int", 4): 7, ("float", 8): 448, ("float", 4): 6}.get((args.type, args.num_bits))
    if not args.symmetric:
        scale = ((high - low) / (2**args.num_bits - 1)).to(scale_type)
        zero = torch.round(-low / scale.float()) - 2 ** (args.num_bits - 1)
        return {"weight_scale": scale, "weight_zero_point": zero.clamp(-(2 ** (args.num_bits - 1)), 2 ** (args.num_bits - 1) - 1).to(torch.int8)}
    scale = torch.maximum(-low, high) / largest
    if storage.startswith("nvfp4"):
        inverse = (448 * 6 / weight.abs().max()).reshape(1)
        return {"weight_scale": (scale * inverse).to(torch.float8_e4m3fn).float(), "weight_global_scale": inverse}
    if storage.startswith("mx"):
        return {"weight_scale": 2.0 ** torch.ceil(torch.log2(scale))}
    return {"weight_scale": scale.to(scale_type)}


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["check", program, decode, model]:
            check(program, decode, model)
        case ["goldens", folder]:
            goldens(folder)
        case _:
            sys.exit(__doc__)
