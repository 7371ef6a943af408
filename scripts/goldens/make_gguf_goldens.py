"""Writes GGUF files with the Python package `gguf` (requirements.txt beside this file), for the tests of marlin-checkpoint.

    make_gguf_goldens.py FOLDER

writes FOLDER/types.gguf, a file with a tensor of every type that is read and metadata of every type of value, and
FOLDER/types.safetensors, what `gguf.quants.dequantize` makes of the tensors;
FOLDER/llama.gguf and FOLDER/qwen3.gguf, small models as llama.cpp's converter writes them, and FOLDER/llama.safetensors and
FOLDER/qwen3.safetensors, their values under the names of Hugging Face;
FOLDER/split/qwen3-0000N-of-00003.gguf, the second of these models in several files.

Blocks are random bytes, so that every code and scale occurs, but for the floats in them, which are finite.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, MODEL_ARCH, GGMLQuantizationType as Type, GGUFValueType as Value, GGUFWriter
from gguf import get_tensor_name_map
from gguf.quants import dequantize, quantize

ROWS = 3
FLOATS = {  # type: where f16 stand in a block
    Type.Q4_0: [0],
    Type.Q4_1: [0, 2],
    Type.Q5_0: [0],
    Type.Q5_1: [0, 2],
    Type.Q8_0: [0],
    Type.Q2_K: [80, 82],
    Type.Q3_K: [108],
    Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2],
    Type.Q6_K: [208],
    Type.IQ4_NL: [0],
}
DENSE = {Type.F32: np.uint32, Type.F16: np.uint16, Type.BF16: np.uint16}
SPECIAL_F16 = [0x0000, 0x8000, 0x0001, 0x83FF, 0x7BFF, 0xFBFF]  # zeros, subnormal numbers, the largest
SPECIAL_EXPONENTS = [0, 1, 2, 127, 253, 254]


def finite(random, shape, bits, exponent_bits):
    """Random floats of so many bits, none of whose exponents is all ones."""
    values = random.integers(0, 1 << bits, shape, dtype=np.uint64)
    mantissa = bits - 1 - exponent_bits
    highest = ((1 << exponent_bits) - 1) << mantissa
    return np.where(values & highest == highest, values ^ (1 << mantissa), values)


def blocks(random, kind):
    """Bytes `[ROWS, bytes of a row]`."""
    weights, size = GGML_QUANT_SIZES[kind]
    if kind in DENSE:
        bits, exponent_bits = size * 8, 5 if kind == Type.F16 else 8
        return finite(random, (ROWS, 20), bits, exponent_bits).astype(DENSE[kind]).view(np.uint8)
    a_row = 2 if weights == 256 else 3
    made = random.integers(0, 256, (ROWS * a_row, size), dtype=np.uint8)
    for at in FLOATS.get(kind, []):
        scales = finite(random, len(made), 16, 5).astype(np.uint16)
        special = random.permutation(len(SPECIAL_F16))[: len(made) // 2]
        scales[: len(special)] = np.array(SPECIAL_F16, dtype=np.uint16)[special]
        made[:, at : at + 2] = random.permutation(scales)[:, None].view(np.uint8)
    if kind == Type.MXFP4:
        made[:, 0] = np.minimum(made[:, 0], 254)
        made[: len(SPECIAL_EXPONENTS), 0] = SPECIAL_EXPONENTS
    return made.reshape(ROWS, -1)


def add_metadata(writer):
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -100)
    writer.add_uint16("test.u16", 60_000)
    writer.add_int16("test.i16", -30_000)
    writer.add_uint32("test.u32", 4_000_000_000)
    writer.add_int32("test.i32", -2_000_000_000)
    writer.add_uint64("test.u64", 1 << 63)
    writer.add_int64("test.i64", -(1 << 62))
    writer.add_float32("test.f32", 0.1)
    writer.add_float64("test.f64", 0.1)
    writer.add_bool("test.true", True)
    writer.add_bool("test.false", False)
    writer.add_string("test.string", "Grüße, 世界\n")
    writer.add_key_value("test.empty", "", Value.STRING)
    writer.add_array("test.strings", ["<s>", "", "▁the", "\u0120a"])
    writer.add_array("test.integers", [3, -1, 2_000_000_000])
    writer.add_array("test.floats", [0.5, -0.25])
    writer.add_array("test.bools", [True, False, True])
    writer.add_array("test.bytes", bytes(range(5)))
    writer.add_array("test.nested", [[1, 2], [3]])


def save_floats(path, tensors):
    """A safetensors file of f32."""
    header, at = {}, 0
    for name, values in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(v.tobytes() for v in tensors.values()))


def write_and_close(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_types(folder):
    random = np.random.default_rng(1)
    writer = GGUFWriter(folder / "types.gguf", "test")
    writer.add_custom_alignment(64)
    add_metadata(writer)
    expected = {}
    for kind in [*DENSE, *FLOATS, Type.MXFP4]:
        made = blocks(random, kind)
        name = f"{kind.name}.weight"
        writer.add_tensor(name, made.copy(), raw_dtype=kind)
        with np.errstate(over="ignore"):
            expected[name] = dequantize(made, kind)
    # A vector and a stack of matrices.
    vector = np.arange(5, dtype=np.float32)
    stack = (np.arange(24, dtype=np.float32) / 4).reshape(2, 3, 4)
    for name, values in [("vector", vector), ("stack", stack)]:
        writer.add_tensor(name, values)
        expected[name] = values
    write_and_close(writer)
    save_floats(folder / "types.safetensors", expected)


HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 2, 1, 16, 24


def model_tensors(random, architecture, vocabulary=VOCABULARY):
    """Tensors of a model with one layer under the names of `transformers`."""
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (vocabulary, HIDDEN),
        layer + "input_layernorm.weight": (HIDDEN,),
        layer + "self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
        layer + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        layer + "post_attention_layernorm.weight": (HIDDEN,),
        layer + "mlp.gate_proj.weight": (HIDDEN, HIDDEN),
        layer + "mlp.up_proj.weight": (HIDDEN, HIDDEN),
        layer + "mlp.down_proj.weight": (HIDDEN, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if architecture == MODEL_ARCH.LLAMA:
        shapes["lm_head.weight"] = (vocabulary, HIDDEN)
        for part, rows in [("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM), ("v", KV_HEADS * HEAD_DIM), ("o", HIDDEN)]:
            shapes[f"{layer}self_attn.{part}_proj.bias"] = (rows,)
    else:
        shapes[layer + "self_attn.q_norm.weight"] = (HEAD_DIM,)
        shapes[layer + "self_attn.k_norm.weight"] = (HEAD_DIM,)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def paired(values, heads):
    """Rows as llama.cpp's converter orders them for Llama: those that rotary embedding turns together are side by side."""
    return values.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(values.shape)


def llama3_factors(theta, factor, low, high, context):
    """Factors on wavelengths (`transformers`, `_compute_llama3_parameters`)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    smooth = (context / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    kept, stretched = wavelengths < context / high, wavelengths > context / low
    return np.where(kept, 1, np.where(stretched, factor, blended)).astype(np.float32)


def write_model(folder, architecture, name, tensors_of_a_file=0):
    writer = GGUFWriter(folder / f"{name}.gguf", name, split_max_tensors=tensors_of_a_file)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    if architecture == MODEL_ARCH.LLAMA:
        writer.add_rope_freq_base(500_000.0)
        writer.add_rope_dimension_count(HEAD_DIM)
        writer.add_vocab_size(VOCABULARY)
        writer.add_tensor("rope_freqs.weight", llama3_factors(500_000.0, 8.0, 1.0, 4.0, 8192))
    else:
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_rope_freq_base(1e6)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    expected = add_tensors(writer, np.random.default_rng(2), architecture)
    write_and_close(writer)
    return expected


def add_tensors(writer, random, architecture, vocabulary=VOCABULARY):
    """Adds the tensors of a model as llama.cpp's converter does; returns their values under the names of `transformers`."""
    names = get_tensor_name_map(architecture, 1)
    expected = {}
    for tensor, values in model_tensors(random, architecture, vocabulary).items():
        kind = Type.Q8_0 if values.ndim == 2 else Type.F32
        expected[tensor] = dequantize(quantize(values, kind), kind)
        if architecture == MODEL_ARCH.LLAMA and ".q_proj" in tensor:
            values = paired(values, HEADS)
        elif architecture == MODEL_ARCH.LLAMA and ".k_proj" in tensor:
            values = paired(values, KV_HEADS)
        writer.add_tensor(names.get_name(tensor, (".weight", ".bias")), quantize(values, kind), raw_dtype=kind)
    return expected


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    write_types(folder)
    for architecture, name in [(MODEL_ARCH.LLAMA, "llama"), (MODEL_ARCH.QWEN3, "qwen3")]:
        save_floats(folder / f"{name}.safetensors", write_model(folder, architecture, name))
    (folder / "split").mkdir(exist_ok=True)
    write_model(folder / "split", MODEL_ARCH.QWEN3, "qwen3", tensors_of_a_file=5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
