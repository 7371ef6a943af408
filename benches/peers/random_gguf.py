"""Writes GGUF files of known shapes with random weights, by the `gguf` package."""

import gguf
import numpy as np

# Layers, hidden, intermediate, query heads, key heads, head width, vocabulary, and whether embedding and head are one: config.json on the Hub.
SHAPES = {
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (28, 2048, 6144, 16, 8, 128, 151936, True),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 128, 151936, True),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 128, 151936, False),
}
# Mixtures of experts: their own sizes, and experts, how many a token goes to, and their width. The first is no real model.
MIXTURES = {
    "qwen3-moe-8l": ((8, 1024, 3072, 16, 8, 128, 151936, False), (32, 4, 512)),
    "qwen3-30b-a3b": ((48, 2048, 6144, 32, 4, 128, 151936, False), (128, 8, 768)),
}
SHAPES |= {name: sizes for name, (sizes, _) in MIXTURES.items()}
# Type of the decoder's matrices and of embedding and head, as llama-quantize chooses them.
TYPES = {
    "Q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q6_K),
    "Q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q8_0),
    "Q4_K": (gguf.GGMLQuantizationType.Q4_K, gguf.GGMLQuantizationType.Q6_K),
    "MXFP4": (gguf.GGMLQuantizationType.MXFP4, gguf.GGMLQuantizationType.Q8_0),
}
# Blocks that are repeated: no kernel looks at values, and large models are written in seconds.
POOL = 4096


def blocks(rng, kind):
    """`POOL` blocks of a type with scales of about 0.01, as bytes."""
    values, size = gguf.GGML_QUANT_SIZES[kind]
    pool = rng.integers(0, 256, (POOL, size), dtype=np.uint8)
    half = lambda value: np.frombuffer(np.float16(value).tobytes(), np.uint8)
    if kind == gguf.GGMLQuantizationType.Q6_K:
        pool[:, -2:] = half(1e-4)
    elif kind == gguf.GGMLQuantizationType.Q4_K:
        pool[:, :4] = np.concatenate([half(1e-4), half(1e-4)])
    elif kind == gguf.GGMLQuantizationType.MXFP4:
        pool[:, 0] = 120
    else:
        pool[:, :2] = half(5e-3)
    return values, pool


def write(path, shape, kind):
    """Writes the model of a shape, its matrices of a type of `TYPES`, to `path`."""
    layers, hidden, intermediate, heads, kv_heads, width, vocabulary, tied = SHAPES[shape]
    of_layers, of_head = TYPES[kind]
    rng = np.random.default_rng(0)
    pools = {type_: blocks(rng, type_) for type_ in {of_layers, of_head}}
    mixture = MIXTURES.get(shape)
    writer = gguf.GGUFWriter(path, "qwen3moe" if mixture else "qwen3")
    writer.add_context_length(40960)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    if mixture:
        experts, used, expert_width = mixture[1]
        writer.add_expert_count(experts)
        writer.add_expert_used_count(used)
        writer.add_expert_feed_forward_length(expert_width)

    def matrix(name, rows, columns, type_=of_layers):
        values, pool = pools[type_]
        data = np.resize(pool, (rows * columns // values, pool.shape[1])).reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=type_)

    def matrices(name, count, rows, columns):
        values, pool = pools[of_layers]
        data = np.resize(pool, (count * rows * columns // values, pool.shape[1])).reshape(count, rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=of_layers)

    def norm(name, size):
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    matrix("token_embd", vocabulary, hidden, of_head)
    if not tied:
        matrix("output", vocabulary, hidden, of_head)
    norm("output_norm", hidden)
    for layer in range(layers):
        at = f"blk.{layer}."
        norm(at + "attn_norm", hidden)
        matrix(at + "attn_q", heads * width, hidden)
        matrix(at + "attn_k", kv_heads * width, hidden)
        matrix(at + "attn_v", kv_heads * width, hidden)
        norm(at + "attn_q_norm", width)
        norm(at + "attn_k_norm", width)
        matrix(at + "attn_output", hidden, heads * width)
        norm(at + "ffn_norm", hidden)
        if not mixture:
            matrix(at + "ffn_gate", intermediate, hidden)
            matrix(at + "ffn_up", intermediate, hidden)
            matrix(at + "ffn_down", hidden, intermediate)
            continue
        router = rng.standard_normal((experts, hidden), np.float32) * np.float32(hidden**-0.5)
        writer.add_tensor(f"{at}ffn_gate_inp.weight", router)
        matrices(at + "ffn_gate_exps", experts, expert_width, hidden)
        matrices(at + "ffn_up_exps", experts, expert_width, hidden)
        matrices(at + "ffn_down_exps", experts, hidden, expert_width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
