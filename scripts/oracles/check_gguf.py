"""Holds GGUF files that are written here against llama.cpp and the Python package `gguf` (gguf-requirements.txt beside
this file).

    check_gguf.py METAL_MARLIN DEQUANTIZE MODEL TEXT

quantises MODEL with the program METAL_MARLIN as GGUF in every format of that layout, and once more in the layout
metal-marlin, which DEQUANTIZE (the example of marlin-checkpoint) decodes. Every tensor must decode to the same values in
the package `gguf`, and llama.cpp must cut TEXT into the same tokens and find it as likely: perplexities may differ by
half a per cent.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from llama_cpp import Llama
from safetensors import deserialize
from tokenizers import Tokenizer

FORMATS = ["int8", "int4-sym", "mxfp4"]
WINDOW, WINDOWS = 512, 8
MODULES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def load(file):
    """All tensors in float32; numpy has no bfloat16."""

    def values(tensor):
        match tensor["dtype"]:
            case "BF16":
                return (np.frombuffer(tensor["data"], np.uint16).astype(np.uint32) << 16).view(np.float32)
            case "F16":
                return np.frombuffer(tensor["data"], np.float16).astype(np.float32)
            case "F32":
                return np.frombuffer(tensor["data"], np.float32)

    return {name: values(tensor).reshape(tensor["shape"]) for name, tensor in deserialize(file.read_bytes())}


def name_of(name):
    module, _, kind = name.rpartition(".")
    if module in OUTER:
        return f"{OUTER[module]}.{kind}"
    _, layer, module = module.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{kind}"


def in_halves(rows, heads):
    """Rows of Llama's queries and keys in the order of Hugging Face."""
    return rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def compare_tensors(file, wanted, config):
    # Factors of rotary embedding come from config.json.
    for tensor in (tensor for tensor in GGUFReader(file).tensors if tensor.name != "rope_freqs.weight"):
        values = dequantize(tensor.data, tensor.tensor_type)
        block, _, last = tensor.name.removesuffix(".weight").rpartition(".")
        if last.endswith("_exps"):
            module = f"model.layers.{block.split('.')[1]}.mlp.experts"
            linear = last.removesuffix("_exps").removeprefix("ffn_")
            pairs = [(f"{module}.{expert}.{linear}_proj.weight", rows) for expert, rows in enumerate(values)]
        else:
            if config["architectures"][0] == "LlamaForCausalLM" and last in ("attn_q", "attn_k"):
                heads = config["num_attention_heads" if last == "attn_q" else "num_key_value_heads"]
                values = in_halves(values, heads)
            pairs = [(name_of(tensor.name), values)]
        for name, found in pairs:
            assert np.array_equal(found.astype(np.float32), wanted.pop(name)), name
    assert not wanted, wanted.keys()


def perplexity(file, ids):
    """Of the first windows, each token from those before it."""
    model = Llama(str(file), n_ctx=WINDOW, n_batch=WINDOW, logits_all=True, verbose=False)
    loss, count = 0.0, 0
    for window in (ids[start : start + WINDOW] for start in range(0, WINDOWS * WINDOW, WINDOW)):
        model.reset()
        model.eval(window)
        logits = np.asarray(model.scores[: WINDOW - 1], dtype=np.float64)
        highest = logits.max(1)
        total = highest + np.log(np.exp(logits - highest[:, None]).sum(1))
        loss += (total - logits[np.arange(WINDOW - 1), window[1:]]).sum()
        count += WINDOW - 1
    return math.exp(loss / count), model


def main(program, decode, model, text):
    config = json.loads(Path(model, "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(Path(model, "tokenizer.json")))
    words = Path(text).read_text()
    ids = tokenizer.encode(words, add_special_tokens=False).ids
    for format in FORMATS:
        with tempfile.TemporaryDirectory() as scratch:
            file, ours, dense = (Path(scratch, name) for name in ("model.gguf", "ours", "dense"))
            groups = ["--group-size", "32", "--embedding-format", "int8", "--embedding-group-size", "32"]
            command = [program, "quantize", model, file, "--method", "mse", "--format", format, "--layout", "gguf", "--json"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            command = [program, "quantize", model, ours, "--method", "mse", "--format", format, *groups, "--json"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            subprocess.run([decode, ours, dense], check=True)
            wanted = {}
            for shard in Path(dense).glob("*.safetensors"):
                wanted |= load(shard)
            compare_tensors(file, wanted, config)
            theirs, loaded = perplexity(file, ids)
            assert loaded.tokenize(words.encode(), add_bos=False, special=False) == ids, "tokens"
            windows = ["--context", str(WINDOW), "--windows", str(WINDOWS)]
            command = [program, "eval", ours, "--text", text, *windows, "--json"]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE)
            found = json.loads(result.stdout)["perplexity"]
            print(f"{format:9} the package decodes the same values; perplexity {found:.4f}, in llama.cpp {theirs:.4f}")
            assert abs(theirs / found - 1) < 0.005


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(*sys.argv[1:])
