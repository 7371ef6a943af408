"""Measures what guessing tokens ahead gains and costs: the same prompt with and without, in turns, the most likely token each time.

    python3 benches/speculation.py MODEL PROMPT.txt -n 256 [--speculate mtp | --draft-model MODEL] [--device cpu] [--rounds 5]

Says whether both had the same tokens, how many guesses were right, and the ratio of the two speeds: the median of the rounds, with the smallest and
the largest in brackets. docs/speculation.md has figures.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompt", type=Path)
    parser.add_argument("-n", "--max-tokens", type=int, default=256)
    parser.add_argument("--draft-model")
    parser.add_argument("--speculate", default="lookup", choices=["lookup", "mtp"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--metal-marlin", default=str(ROOT / "target/release/metal-marlin"))
    arguments = parser.parse_args()

    def run(*options):
        command = [arguments.metal_marlin, "run", arguments.model, "-", "--json", "--temperature", "0", "--ignore-eos", "--batch-invariant",
                   "--device", arguments.device, "-n", str(arguments.max_tokens), *options]
        if arguments.threads:
            command += ["--threads", arguments.threads]
        done = subprocess.run(command, input=arguments.prompt.read_text(), capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        return json.loads(done.stdout)

    guesses = ["--draft-model", arguments.draft_model] if arguments.draft_model else ["--speculate", arguments.speculate]
    ratios, rates = [], []
    for _ in range(arguments.rounds):
        plain, guessed = run("--speculate", "off"), run(*guesses)
        if plain["tokens"] != guessed["tokens"]:
            sys.exit("the tokens differ")
        pair = [answer["timings"]["decode_tokens_per_second"] for answer in (plain, guessed)]
        rates.append(pair)
        ratios.append(pair[1] / pair[0])
    print(f"{len(plain['tokens'])} tokens, the same; {guessed['accepted_tokens']} of {guessed['drafted_tokens']} guesses right")
    print("tokens/s without, with: " + ", ".join(f"{without:.1f} {with_:.1f}" for without, with_ in rates))
    print(f"{statistics.median(ratios):.3f} [{min(ratios):.3f} {max(ratios):.3f}] times as fast")


if __name__ == "__main__":
    main()
