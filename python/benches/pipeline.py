"""How fast the pipeline decodes, beside the program.

    python benches/pipeline.py [MODEL] [--binary target/release/metal-marlin] [--tokens 200] [--rounds 7]

Both generate the same tokens from the same prompt, in turns, so that whatever else the machine does meets both. Given are medians
of tokens a second after the first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from metal_marlin.inference.pipeline import MarlinPipeline

PROMPT = "Once upon a time"


def main() -> None:
    """Measures, and prints a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, GGUF file or id on the Hub [default: the bundled model]")
    parser.add_argument("--binary", help="the program [default: that of this package]")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()

    options = ["--device=cpu", "--temperature=0", "--ignore-eos", f"--max-tokens={args.tokens}", "--speculate=off"]
    options += [f"--threads={args.threads}"] if args.threads else []
    program = [args.binary] if args.binary else [sys.executable, "-m", "metal_marlin"]
    command = [*program, "run", *options, "--json", "--", *([args.model] if args.model else []), PROMPT]
    pipe = MarlinPipeline.from_pretrained(args.model, device="cpu", threads=args.threads, speculate="off")

    rates: dict[str, list[float]] = {"program": [], "pipeline": [], "stream": []}
    texts = set()
    for _ in range(args.rounds):
        run = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
        rates["program"].append(run["timings"]["decode_tokens_per_second"])
        called = pipe(PROMPT, temperature=0, ignore_eos=True, max_tokens=args.tokens)
        rates["pipeline"].append(called.tokens_per_second or 0)
        with pipe.stream(PROMPT, temperature=0, ignore_eos=True, max_tokens=args.tokens) as stream:
            streamed = "".join(stream)
            rates["stream"].append(stream.completion.tokens_per_second or 0)
        texts |= {run["text"], str(called), streamed}
    assert len(texts) == 1, "all say the same"
    program_rate = statistics.median(rates["program"])
    for name, measured in rates.items():
        rate = statistics.median(measured)
        print(f"{name:<9} {rate:8.1f} tokens/s  {100 * rate / program_rate:6.1f} % of the program's")


if __name__ == "__main__":
    main()
