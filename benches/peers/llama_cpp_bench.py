"""Measures Metal Marlin beside llama.cpp on this machine's CPU: the same shape, random weights, one after the other.

    python -m venv peers && CMAKE_ARGS=-DGGML_NATIVE=ON peers/bin/pip install --no-binary llama-cpp-python -r requirements.txt
    cargo build --release
    peers/bin/python llama_cpp_bench.py --shape qwen3-0.6b --types Q4_0,MXFP4 --threads 2

Every round measures each test once with either program, so that a machine that slows down slows down both; the table has medians and, in
brackets, the smallest and the largest. The ratio is that of a round's figures, of llama.cpp's fastest type and flash attention setting in it.
A model of llama.cpp is kept between rounds, ours is made anew: neither's loading is part of a figure. Threads of OpenMP wait as they do by default,
for a moment actively: told to wait passively, llama.cpp decodes at half of its speed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import random_gguf
from llama_model import LlamaModel

ROOT = Path(__file__).resolve().parents[2]


def tests(arguments):
    """Kind, tokens and depth of each test, by its name."""
    prefill = {f"pp{n}": ("prefill", n, 0) for n in arguments.prefill if n}
    name = f"tg{arguments.decode}"
    decode = {name if depth == 0 else f"{name} @ d{depth}": ("decode", arguments.decode, depth) for depth in arguments.depths}
    return prefill | (decode if arguments.decode else {})


def marlin(arguments):
    """Tokens a second of each test, measured once."""
    command = [
        arguments.metal_marlin, "bench", "--device", "cpu", "--shape", arguments.shape, "--output", "json", "--repetitions", "1",
        "--threads", str(arguments.threads), "--prefill", ",".join(map(str, arguments.prefill)), "--decode", str(arguments.decode),
        "--depths", ",".join(map(str, arguments.depths)), *arguments.options.split(),
    ]  # fmt: skip
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {result["test"]: result["tokens_per_second"]["median"] for result in report["results"]}


def spread(values):
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser.add_argument("--shape", default="qwen3-0.6b", choices=random_gguf.SHAPES, help="sizes of a known model")
    parser.add_argument("--types", default="Q4_0", help=f"llama.cpp's weights: {', '.join(random_gguf.TYPES)}; several with commas")
    parser.add_argument("--options", default="--format fp4 --group-size 128", help="of metal-marlin bench")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prefill", type=numbers, default=[128, 512])
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--depths", type=numbers, default=[0, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--metal-marlin", default=str(ROOT / "target/release/metal-marlin"), help="the program")
    arguments = parser.parse_args()

    wanted = tests(arguments)
    context = max(tokens + depth for _, tokens, depth in wanted.values()) + 8
    ours = {name: [] for name in wanted}
    theirs = {name: {} for name in wanted}
    ratios = {name: [] for name in wanted}
    with tempfile.TemporaryDirectory() as folder:
        models = {}
        for kind in arguments.types.split(","):
            path = Path(folder) / f"{kind}.gguf"
            random_gguf.write(path, arguments.shape, kind)
            for flash in (False, True):
                models[f"{kind}{' fa' if flash else ''}"] = LlamaModel(path, context, arguments.threads, flash)
        for round_ in range(arguments.rounds):
            speeds = marlin(arguments)
            for name, test in wanted.items():
                of_round = {}
                for label, model in models.items():
                    of_round[label] = model.tokens_per_second(*test)
                    theirs[name].setdefault(label, []).append(of_round[label])
                ours[name].append(speeds[name])
                ratios[name].append(speeds[name] / max(of_round.values()))
            print(f"round {round_ + 1} of {arguments.rounds}", file=sys.stderr)

    print(f"{arguments.shape}, {arguments.threads} threads; metal-marlin {arguments.options}; tokens/s")
    header = ["test", "metal-marlin", *models, "ratio to the fastest"]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    for name in wanted:
        row = [name, spread(ours[name]), *(spread(theirs[name][label]) for label in models)]
        ratio = ratios[name]
        row.append(f"{statistics.median(ratio):.2f} ({min(ratio):.2f} to {max(ratio):.2f})")
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
