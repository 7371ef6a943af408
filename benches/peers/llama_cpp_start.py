"""Measures what a start costs, Metal Marlin beside llama.cpp on this machine's CPU: seconds from nothing to the first token, and peak memory.

    peers/bin/python llama_cpp_start.py --shape qwen3-0.6b --type Q4_0

(`llama_cpp_bench.py` says how `peers` is made.) The model of a shape has random weights. Ours is a checkpoint that `metal-marlin quantize` made, and
starts twice: the first time it puts weights into its own order and keeps them, later it finds them kept. Every start is a process of its own;
"cold" ones begin after the system's cache of files was dropped, which only root may do. llama.cpp's seconds are those of loading and of one token, without
Python's own start; memory is the largest resident set of the process, of llama.cpp without what Python had taken before.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import random_gguf
from llama_cpp_bench import ROOT

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
LLAMA = """
import resource, sys, time, json
from llama_model import LlamaModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
LlamaModel(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), True)
seconds = time.perf_counter() - start
print(json.dumps([seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024]))
"""


def write_checkpoint(folder, shape, tokenizer):
    """A bf16 checkpoint of a shape, its weights random, with the tokenizer of another model."""
    layers, hidden, intermediate, heads, kv_heads, width, vocabulary, tied = random_gguf.SHAPES[shape]
    tensors = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not tied:
        tensors["lm_head.weight"] = (vocabulary, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        attention, mlp = at + "self_attn.", at + "mlp."
        tensors |= {at + "input_layernorm.weight": (hidden,), at + "post_attention_layernorm.weight": (hidden,)}
        tensors |= {attention + "q_norm.weight": (width,), attention + "k_norm.weight": (width,)}
        tensors |= {attention + f"{name}_proj.weight": (n * width, hidden) for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))}
        tensors |= {attention + "o_proj.weight": (hidden, heads * width)}
        tensors |= {mlp + f"{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        tensors |= {mlp + "down_proj.weight": (hidden, intermediate)}
    folder.mkdir()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": vocabulary, "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": intermediate, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": width,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "tie_word_embeddings": tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder)
    rng = np.random.default_rng(0)
    # The upper halves of f32 are bf16. They repeat, as no kernel looks at values.
    pool = (rng.standard_normal(1 << 22, np.float32) * 0.02).view(np.uint32).__rshift__(16).astype(np.uint16)
    header, at = {}, 0
    for name, tensor_shape in tensors.items():
        size = 2 * int(np.prod(tensor_shape))
        header[name] = {"dtype": "BF16", "shape": tensor_shape, "data_offsets": [at, at + size]}
        at += size
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor_shape in tensors.values():
            np.resize(pool, int(np.prod(tensor_shape))).tofile(file)


def drop_file_cache():
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def peak_of(command, environment):
    """Seconds to the first byte of output, and MiB, of a process."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0 or not first:
        sys.exit(f"{' '.join(map(str, command))} failed")
    return seconds, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=[name for name in random_gguf.SHAPES if name not in random_gguf.MIXTURES], help="sizes of a known model")
    parser.add_argument("--type", default="Q4_0", choices=random_gguf.TYPES, help="llama.cpp's weights")
    parser.add_argument("--options", default="--method mse --format fp4 --group-size 128 --embedding-format fp4", help="of metal-marlin quantize")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the models are made [default: a temporary folder]")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "crates/metal-marlin/model", help="folder of a model whose tokenizer the checkpoint takes")
    parser.add_argument("--metal-marlin", default=str(ROOT / "target/release/metal-marlin"), help="the program")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        folder = Path(folder)
        write_checkpoint(folder / "bf16", arguments.shape, arguments.tokenizer)
        ours, theirs = folder / "ours", folder / "theirs.gguf"
        quantize = [arguments.metal_marlin, "quantize", folder / "bf16", ours, *arguments.options.split()]
        subprocess.run(quantize, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        shutil.rmtree(folder / "bf16")
        random_gguf.write(theirs, arguments.shape, arguments.type)
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
        run = [
            arguments.metal_marlin, "run", ours, "A", "--device", "cpu", "--threads", str(arguments.threads), "--context", str(arguments.context),
            "--max-tokens", "4", "--temperature", "0",
        ]  # fmt: skip

        def llama():
            command = [sys.executable, "-c", LLAMA, theirs, str(arguments.context), str(arguments.threads)]
            found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
            return tuple(json.loads(found.stdout))

        def marlin_first():
            shutil.rmtree(folder / "cache", ignore_errors=True)
            return peak_of(run, environment)

        starts = {"metal-marlin, first": marlin_first, "metal-marlin, later": lambda: peak_of(run, environment), "llama.cpp": llama}
        results = {}
        for _ in range(arguments.rounds):
            for state in ("cold", "warm"):
                for name, start in starts.items():
                    if state == "cold":
                        drop_file_cache()
                    results.setdefault((name, state), []).append(start())
    print(f"{arguments.shape}, {arguments.threads} threads, context {arguments.context}; {arguments.options}; {arguments.type}")
    print("| start | files | seconds to the first token | MiB |\n| --- | --- | --- | --- |")
    for (name, state), values in results.items():
        seconds, memory = zip(*values)
        low, high = min(seconds), max(seconds)
        print(f"| {name} | {state} | {statistics.median(seconds):.2f} ({low:.2f} to {high:.2f}) | {statistics.median(memory):.0f} |")


if __name__ == "__main__":
    main()
