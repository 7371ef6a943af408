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


# Those of `metal-marlin bench-serve`, so that each is a token.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work number night point home water room mother area money story fact month lot right study "
    "book eye job word business"
).split()


def write_tokenizer(writer, vocabulary):
    """A tokenizer in the manner of SentencePiece: bytes, the words above with all their beginnings, and others that no text has."""
    pieces = dict.fromkeys(("\u2581" + word)[:length] for word in WORDS for length in range(1, len(word) + 2))
    pieces |= dict.fromkeys(letter for word in WORDS for letter in word)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + list(pieces)
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL] + [gguf.TokenType.BYTE] * 256
    types += [gguf.TokenType.NORMAL] * (vocabulary - len(types))
    tokens += [f"\u2581x{number}" for number in range(vocabulary - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    # The longer a piece, the sooner it is put together.
    writer.add_token_scores([float(len(token)) for token in tokens])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


def write(path, shape, kind, with_tokenizer=False):
    """Writes the model of a shape, its matrices of a type of `TYPES`, to `path`; to be served, it needs a tokenizer."""
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
    if with_tokenizer:
        write_tokenizer(writer, vocabulary)
    else:
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
