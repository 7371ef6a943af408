"""Writes a Hugging Face folder of a known shape with random weights in bf16, to serve where no model can be had: its tokens are words.

    python benches/peers/random_checkpoint.py qwen3-0.6b OUT && metal-marlin serve OUT --format fp4 --method mse

A pair of which the small one guesses what the large one says (docs/speculation.md), because the layers of the large one beyond the first two add nothing:

    python benches/peers/random_checkpoint.py 1b LARGE --live-layers 2 && python benches/peers/random_checkpoint.py 1b SMALL --layers 2
"""

import argparse
import json
from pathlib import Path

import numpy as np

# Layers, hidden, intermediate, query heads, key heads, head width, vocabulary: config.json on the Hub. All are tied.
SHAPES = {
    "qwen3-0.6b": (28, 1024, 3072, 16, 8, 128, 151936),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 128, 151936),
    # No real model's.
    "1b": (20, 2048, 6144, 16, 8, 128, 32000),
}
# Those of `metal-marlin bench-serve`, so that each is a token.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work number night point home water room mother area money story fact month lot right study "
    "book eye job word business"
).split()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="only the first so many")
    parser.add_argument("--live-layers", type=int, help="layers after so many add nothing to what those before say")
    arguments = parser.parse_args()
    layers, hidden, intermediate, heads, kv_heads, width, vocabulary = SHAPES[arguments.shape]
    layers = arguments.layers or layers
    live_layers = arguments.live_layers or layers
    out = arguments.out
    out.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": layers, "hidden_size": hidden,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width,
        "vocab_size": vocabulary, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
        "max_position_embeddings": 40960, "attention_bias": False, "torch_dtype": "bfloat16", "eos_token_id": 0,
    }
    (out / "config.json").write_text(json.dumps(config))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    words = ["<end>"] + WORDS + [f"w{n}" for n in range(vocabulary - 1 - len(WORDS))]
    tokenizer = {
        "version": "1.0", "pre_tokenizer": {"type": "Whitespace"},
        "added_tokens": [{"id": 0, "content": "<end>", "special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}],
        "model": {"type": "WordLevel", "unk_token": "<end>", "vocab": {word: index for index, word in enumerate(words)}},
    }
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))

    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        block = f"model.layers.{layer}."
        shapes |= {
            block + "input_layernorm.weight": (hidden,), block + "post_attention_layernorm.weight": (hidden,),
            block + "self_attn.q_proj.weight": (heads * width, hidden), block + "self_attn.k_proj.weight": (kv_heads * width, hidden),
            block + "self_attn.v_proj.weight": (kv_heads * width, hidden), block + "self_attn.o_proj.weight": (hidden, heads * width),
            block + "self_attn.q_norm.weight": (width,), block + "self_attn.k_norm.weight": (width,),
            block + "mlp.gate_proj.weight": (intermediate, hidden), block + "mlp.up_proj.weight": (intermediate, hidden),
            block + "mlp.down_proj.weight": (hidden, intermediate),
        }
    header, offset = {}, 0
    for name, dims in shapes.items():
        size = 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    rng = np.random.default_rng(0)
    with open(out / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, dims in shapes.items():
            values = np.ones(dims, np.float32) if len(dims) == 1 else rng.standard_normal(dims, np.float32) * np.float32(0.02)
            is_live = ".layers." not in name or int(name.split(".")[2]) < live_layers
            if name.endswith(("o_proj.weight", "down_proj.weight")) and not is_live:
                values[:] = 0
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())


if __name__ == "__main__":
    main()
