"""Measures how much sooner the first token comes after a restart when what the KV cache held is on disk (docs/server.md).

    python3 benches/kv_cache_restart.py MODEL [--words 2000] [--rounds 5] [--device cpu] [--metal-marlin target/release/metal-marlin]

A server is started with a folder for its cache, asked once about a long system prompt, and killed (SIGKILL) when the prompt is on disk. Then, in turns,
a server without the folder and one with it are started, asked a first word about something else, so that weights are in memory, and another
question about the same system prompt. Says whether both answered the same, the times to the first token, and their ratio: the median of the rounds,
with the smallest and the largest in brackets.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

BLOCK_TOKENS = 32
ROOT = Path(__file__).resolve().parents[1]
# Each is a token of most models, and of those that `benches/peers/random_checkpoint.py` makes.
WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand part place case "
    "week company system program question work number night point home water room mother area money story fact month lot right study "
    "book eye job word business"
).split()


class Server:
    """A server in a process of its own, at a port that is free."""

    def __init__(self, arguments, *options):
        command = [arguments.metal_marlin, "serve", arguments.model, "--port", "0", "--device", arguments.device, "--served-name", "m"]
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([*command, *options], stderr=self.log)
        self.url = None
        while self.url is None:
            if self.process.poll() is not None:
                self.log.seek(0)
                sys.exit(self.log.read())
            time.sleep(0.02)
            self.log.seek(0)
            found = re.search(r"at (http://\S+)/v1", self.log.read())
            self.url = found and found[1]

    def ask(self, prompt, max_tokens):
        """Seconds to the first token, the text, and tokens that were cached."""
        body = {"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
                "stream_options": {"include_usage": True}}
        request = urllib.request.Request(self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        started, first, text, usage = time.monotonic(), None, "", None
        with urllib.request.urlopen(request, timeout=3600) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[len(b"data: "):])
                piece = "".join(choice["text"] for choice in event["choices"])
                if piece and first is None:
                    first = time.monotonic() - started
                text += piece
                usage = event.get("usage") or usage
        return first, text, usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]

    def kill(self):
        self.process.kill()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--words", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--option", action="append", default=[], help="a further option of `serve`, such as --option=--context=4096")
    parser.add_argument("--metal-marlin", default=str(ROOT / "target/release/metal-marlin"))
    arguments = parser.parse_args()
    words = random.Random(0)
    system = " ".join(words.choice(WORDS) for _ in range(arguments.words))

    def question(number):
        return system + " " + " ".join(random.Random(number).choice(WORDS) for _ in range(8))

    def round_of(number, *options):
        server = Server(arguments, *arguments.option, *options)
        server.ask("case number", 1)
        answer = server.ask(question(number), 4)
        server.kill()
        return answer

    with tempfile.TemporaryDirectory() as folder:
        kept = ["--kv-cache-dir", folder]
        server = Server(arguments, *arguments.option, *kept)
        *_, tokens = server.ask(question(0), 1)
        blocks = []
        while len(blocks) < tokens // BLOCK_TOKENS:
            time.sleep(0.1)
            blocks = list(Path(folder).rglob("*.block"))
        server.kill()
        size = sum(block.stat().st_size for block in blocks)
        print(f"a prompt of {tokens} tokens; {size / 2**20:.0f} MiB on disk", flush=True)
        ratios = []
        for number in range(1, arguments.rounds + 1):
            without, with_ = round_of(number), round_of(number, *kept)
            if without[1] != with_[1]:
                sys.exit(f"the answers differ: {without[1]!r}, {with_[1]!r}")
            ratios.append(without[0] / with_[0])
            print(f"first token after {without[0]:.2f} s without, {with_[0]:.2f} s with {with_[2]} tokens from disk", flush=True)
    print(f"{statistics.median(ratios):.1f} [{min(ratios):.1f} {max(ratios):.1f}] times sooner; the answers are the same")


if __name__ == "__main__":
    main()
