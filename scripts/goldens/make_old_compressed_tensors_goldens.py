"""Makes a folder with release 0.10.2 of the Python package `compressed-tensors`, for the tests of
marlin-checkpoint: words that leave bits over, columns in another order, 2:4 sparsity. It runs in an environment
of its own, with `compressed-tensors==0.10.2` and otherwise the versions of requirements.txt beside this file.

    make_old_compressed_tensors_goldens.py FOLDER

writes FOLDER with the weights that the package decodes in f32, in expected.safetensors. The package cannot decode
marlin-24; what it is given to pack stands there.
"""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors.quantized_compressors.pack_quantized import (
    PackedQuantizationCompressor,
    unpack_from_int32,
)
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
    Sparse24BitMaskTensor,
    get_24_bytemasks,
)
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import Marlin24Compressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from safetensors.torch import save_file

# Zero points are packed down the rows, which must fill words then.
PACKED = {  # module: arguments, shape, act-order
    "a.int3_group": (dict(num_bits=3, strategy="group", group_size=16), (9, 64), False),
    "a.int5_asym_group": (dict(num_bits=5, strategy="group", group_size=16, symmetric=False), (12, 96), False),
    "a.int6_asym_row": (dict(num_bits=6, strategy="channel", symmetric=False), (10, 37), False),
    "a.int7_row": (dict(num_bits=7, strategy="channel"), (5, 41), False),
    "a.int4_order": (dict(num_bits=4, strategy="group", group_size=16, symmetric=False), (8, 64), True),
    "a.int4_unset_order": (dict(num_bits=4, strategy="group", group_size=16), (3, 32), None),
}
SPARSE = {  # module: arguments, shape, type
    "b.f16": (None, (5, 32), torch.float16),
    "b.bf16_odd": (None, (6, 36), torch.bfloat16),
    "b.f32": (None, (4, 24), torch.float32),
    "b.fp8_row": (dict(num_bits=8, type="float", strategy="channel"), (7, 40), torch.float8_e4m3fn),
    "b.int8_row": (dict(num_bits=8, strategy="channel"), (7, 44), torch.int8),
}
MARLIN = {  # module: arguments, shape
    "c.int4_groups": (dict(num_bits=4, strategy="group", group_size=128), (64, 384)),
    "c.int4_wide_groups": (dict(num_bits=4, strategy="group", group_size=128), (64, 128)),
    "c.int8_row": (dict(num_bits=8, strategy="channel"), (128, 64)),
}


def scales(weight, args, g_idx=None):
    """Round-to-nearest scales and zero points."""
    if g_idx is not None:
        weight = weight[:, torch.argsort(g_idx, stable=True)]
    runs = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
    low, high = runs.amin(-1).clamp(max=0), runs.amax(-1).clamp(min=0)
    half = 2 ** (args.num_bits - 1)
    if args.symmetric:
        largest = 448 if args.type == "float" else half - 1
        return (torch.maximum(-low, high) / largest).half(), None
    scale = ((high - low) / (2 * half - 1)).half()
    return scale, (torch.round(-low / scale.float()) - half).clamp(-half, half - 1).to(torch.int8)


def pruned(weight):
    return weight * get_24_bytemasks(weight)


def packed(weight, args, act_order):
    cols = weight.shape[1]
    g_idx = torch.randperm(cols).to(torch.int32) // args.group_size if act_order else None
    scale, zero = scales(weight, args, g_idx)
    stored = PackedQuantizationCompressor().compress_weight(weight, scale.float(), args, zero_point=zero, g_idx=g_idx)
    # Its decompress_weight takes no packed zero points.
    codes = unpack_from_int32(stored["weight_packed"], args.num_bits, weight.shape)
    if zero is not None:
        zero = unpack_from_int32(stored["weight_zero_point"], args.num_bits, zero.shape, packed_dim=0)
    decoded = dequantize(codes, scale.float(), zero, args=args, dtype=torch.float32, g_idx=g_idx)
    stored |= {"weight_scale": scale} | ({} if g_idx is None else {"weight_g_idx": g_idx})
    if act_order is None:
        stored["weight_g_idx"] = torch.full((cols,), -1, dtype=torch.int32)
    return stored, decoded


def sparse(weight, args, dtype):
    if args is None:
        made = Sparse24BitMaskTensor.from_dense(weight.to(dtype))
        return made, {}, made.decompress()
    scale, _ = scales(weight, args)
    codes = quantize(weight, scale.float(), None, args, dtype=dtype)
    made = Sparse24BitMaskTensor.from_dense(codes)
    # Not every kind of number can be put into place by a mask.
    whole = Sparse24BitMaskTensor(made.shape, made.compressed.view(torch.int8), made.bitmask).decompress().view(dtype)
    return made, {"weight_scale": scale}, dequantize(whole, scale.float(), args=args, dtype=torch.float32)


def marlin(weight, args):
    scale, _ = scales(weight, args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"x.weight": weight, "x.weight_scale": scale}
    stored = Marlin24Compressor().compress(state, {"x": scheme})
    # The package quantises in half precision.
    codes = quantize(weight.half(), scale, None, args)
    decoded = dequantize(codes.float(), scale.float(), args=args, dtype=torch.float32)
    return {name.removeprefix("x."): tensor for name, tensor in stored.items()}, decoded


def main(folder):
    torch.manual_seed(5)
    tensors, expected, groups = {}, {}, {}

    def add(module, stored, decoded, storage, args):
        tensors.update({f"{module}.{name}": t.contiguous() for name, t in stored.items()})
        expected[f"{module}.weight"] = decoded.float().contiguous()
        if args is not None:
            weights = args.model_dump(mode="json")
            groups[module] = {"targets": [module], "weights": weights, "format": storage}

    for module, (args, shape, act_order) in PACKED.items():
        args = QuantizationArgs(**args)
        add(module, *packed(torch.randn(shape), args, act_order), "pack-quantized", args)
    for module, (args, shape, dtype) in SPARSE.items():
        args = args and QuantizationArgs(**args)
        made, rest, decoded = sparse(pruned(torch.randn(shape)), args, dtype)
        stored = {name.removeprefix("x."): t for name, t in made.dict("x").items()}
        add(module, stored | rest, decoded, "naive-quantized", args)
    for module, (args, shape) in MARLIN.items():
        args = QuantizationArgs(**args)
        add(module, *marlin(pruned(torch.randn(shape)), args), "marlin-24", args)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    save_file(expected, folder / "expected.safetensors")
    sparsity = {"format": "sparse-24-bitmask", "targets": ["Linear"], "ignore": []}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups, "sparsity_config": sparsity}
    config = {"model_type": "test", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
