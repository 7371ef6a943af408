"""Compares token ids of GGUF files with those of llama.cpp (requirements.txt beside this file).

    cargo build --release -p marlin-checkpoint --example tokenize
    check_gguf_tokenizers.py target/release/examples/tokenize FILE.gguf ...

Files may hold a vocabulary alone, as those of llama.cpp's own tests do (`models/ggml-vocab-*.gguf` in its sources). Texts
are drawn at random of pieces that are cut in unlike ways: words, digits, spaces, line ends, scripts, emoji, special tokens.

Not compared, for here tokenizer.json of the models is followed, not llama.cpp: `</s>`, which is an ordinary token of Qwen2
that llama.cpp takes for a special one; letters with combining marks, which Qwen2 composes; spaces other than ASCII behind
special tokens of Phi-3.
"""

import json
import random
import subprocess
import sys

from llama_cpp import Llama

PIECES = [
    *"aZ019 \n\t\r.,'\"-_/(){}<>#@&|~^$+=*%!?", " ", "  ", "   ", "        ", "\n\n", "\r\n", " \n", "\t\t", "Hello", " world",
    "I've", "we'LL", "'s", "'RE", "don't", "straße", "naïve", "Ωμέγα", "Привет", " мир", "世界", "你好，", "こんにちは", "カタカナ",
    "안녕", "שלום", "مرحبا", "ไทย", "កាន់", "हिन्दी", "é", "ǅ", "Ǆ", "🦙", "👩‍👩‍👧", "🇩🇪", "1234567", "3.14", "٣", "Ⅷ", "½", "x²",
    "…", "“quoted”", "—", "\u3000", "\u00a0", "\u200b", "\u2028", "\ufeff", "\x00", "\x7f", "def f(x):\n    return x\n", "CamelCase", "HTTPServer", "snake_case",
    "http://a.b/c?d=e", "▁", "<s>", "<0x0A>",
]  # fmt: skip
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<bos>", "<|end|>"]
TEXTS = 3000


def texts(seed, special):
    draw = random.Random(seed)
    yield from ["", " ", *PIECES, *special]
    pieces = PIECES + special
    for _ in range(TEXTS):
        yield "".join(draw.choice(pieces) for _ in range(draw.randint(1, 12)))


def check(program, path):
    model = Llama(path, vocab_only=True, verbose=False)
    inputs = list(texts(1, SPECIAL))
    wanted = [model.tokenize(text.encode(), add_bos=True, special=True) for text in inputs]
    lines = "".join(json.dumps(text) + "\n" for text in inputs)
    output = subprocess.run([program, path], input=lines, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in output.splitlines()]
    assert len(found) == len(wanted)
    wrong = [(text, a, b) for text, a, b in zip(inputs, found, wanted) if a != b]
    for text, a, b in wrong[:5]:
        print(f"  {text!r}:\n    {a}\n    {b} (llama.cpp)")
    print(f"{path}: {len(inputs) - len(wrong)} of {len(inputs)} texts agree")
    return not wrong


if __name__ == "__main__":
    program, *paths = sys.argv[1:]
    sys.exit(not all([check(program, path) for path in paths]))
