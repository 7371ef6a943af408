"""Measures `metal-marlin serve` beside the server of llama-cpp-python on this machine's CPU: the same GGUF file, random weights.

    peers/bin/pip install "llama-cpp-python[server]"
    peers/bin/python llama_cpp_serve.py --shape qwen3-0.6b --type Q4_0 --threads 2

(`llama_cpp_bench.py` says how `peers` is made.) Both servers run all the time, and answer in turns: a round asks each for one answer at a time and for several,
and for a long prompt twice, by `metal-marlin bench-serve`. Figures are medians of the rounds, with the smallest and the largest in brackets.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import random_gguf

ROOT = Path(__file__).resolve().parents[2]
PORTS = {"metal-marlin": 8711, "llama.cpp": 8712}


def wait_for(port):
    """Until a server answers."""
    for _ in range(1200):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").read()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise SystemExit(f"no server at port {port}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=random_gguf.SHAPES)
    parser.add_argument("--type", default="Q4_0", choices=random_gguf.TYPES)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=30)
    parser.add_argument("--long-words", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--metal-marlin", default=str(ROOT / "target/release/metal-marlin"))
    arguments = parser.parse_args()

    def ask(program, *options):
        url = f"http://127.0.0.1:{PORTS[program]}/v1"
        command = [arguments.metal_marlin, "bench-serve", "--url", url, "--json", "--ban-token", "2", *map(str, options)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise SystemExit(f"{program}: {run.stderr}")
        return json.loads(run.stdout)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{arguments.shape}-{arguments.type}.gguf"
        random_gguf.write(path, arguments.shape, arguments.type, with_tokenizer=True)
        threads = str(arguments.threads)
        context = str(arguments.long_words + 1024)
        servers = [
            subprocess.Popen(
                [arguments.metal_marlin, "serve", path, "--device", "cpu", "--threads", threads, "--port", str(PORTS["metal-marlin"]),
                 "--context", context], stderr=subprocess.DEVNULL,
            ),
            subprocess.Popen(
                [sys.executable, "-m", "llama_cpp.server", "--model", path, "--n_threads", threads, "--n_threads_batch", threads, "--n_ctx", context,
                 "--interrupt_requests", "False", "--port", str(PORTS["llama.cpp"])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ),
        ]
        figures = {}
        try:
            for port in PORTS.values():
                wait_for(port)
            for round_ in range(arguments.rounds):
                for program in PORTS:
                    seed = 100 * round_
                    answers = ["--max-tokens", arguments.max_tokens, "--prompt-words", arguments.prompt_words]
                    one = ask(program, "-c", 1, "-n", 2, "--seed", seed, *answers)
                    many = ask(program, "-c", arguments.streams, "-n", 2 * arguments.streams, "--seed", seed + 1, *answers)
                    long = ["-c", 1, "-n", 1, "--max-tokens", 4, "--prompt-words", arguments.long_words, "--seed", seed + 2]
                    cold, warm = ask(program, *long), ask(program, *long)
                    measured = {
                        "one at a time, tokens/s": one["generated_tokens_per_second"],
                        f"{arguments.streams} at a time, tokens/s": many["generated_tokens_per_second"],
                        f"{arguments.streams} at a time, first token, ms": many["first_token_ms"]["p50"],
                        f"{arguments.streams} at a time, between tokens, ms": many["between_tokens_ms"]["p50"],
                        f"{arguments.long_words} words, first token, ms": cold["first_token_ms"]["p50"],
                        "the same again, ms": warm["first_token_ms"]["p50"],
                    }
                    for name, value in measured.items():
                        figures.setdefault(name, {}).setdefault(program, []).append(value)
        finally:
            for server in servers:
                server.terminate()
                server.wait()

    print(f"| {arguments.shape}, {arguments.type}, {arguments.threads} threads | " + " | ".join(PORTS) + " |")
    print("| --- |" + " --- |" * len(PORTS))
    for name, by_program in figures.items():
        cells = [f"{statistics.median(by_program[program]):.1f} [{min(by_program[program]):.1f} {max(by_program[program]):.1f}]" for program in PORTS]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
