"""Writes vocabularies in GGUF files and the token ids that llama.cpp makes of texts (requirements.txt beside this file).

    make_gguf_tokenizer_goldens.py FOLDER

writes FOLDER/bytes.gguf, a byte-level vocabulary, FOLDER/pieces.gguf, one of SentencePiece, both without tensors, and
FOLDER/tokens.json: texts, and their ids by each kind of pre-tokenizer (`tokenizer.ggml.pre`, which the tests put into
bytes.gguf), and by pieces.gguf with and without a space before texts;
FOLDER/chat.gguf, a whole model: Qwen3 with random weights, that vocabulary and a chat template.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, TokenType
from llama_cpp import Llama
from make_gguf_goldens import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, add_tensors, write_and_close
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

KINDS = [
    "default", "gpt-2", "llama-bpe", "chatglm-bpe", "glm4", "qwen2", "qwen35", "stablelm2", "tekken", "gpt-4o", "smollm",
    "deepseek-llm", "deepseek-coder", "deepseek-v3", "falcon",
]  # fmt: skip
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    " ",
    "Hello world, hello  world!",
    "I've SEEN what they'll do; we'RE not.",
    "1 12 123 1234 12345 3.14159 1,000",
    "\n\n  \n\tdef f(x):\n        return x**2  # a\r\n\r\n",
    "CamelCase snake_case HTTPServer http://a.b/c?d=e&f",
    "naïve straße Ωμέγα Привет, мир",
    "你好，世界。こんにちは カタカナ 안녕하세요",
    "مرحبا हिन्दी ไทย",
    "🦙🦙 👩‍👩‍👧 x² Ⅷ ½ “quoted” — …",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "tabs\t\tand   trailing   ",
    "$a+b=c$ `code` ~~~ ---- ####",
]
CORPUS = [
    "Hello world, hello world! The model says hello to the whole world of the other models.",
    "I've seen what they'll do with the return value of the function def f(x): return x",
    "1234 123 12 3.14 1000 http://the.server/and the user and the assistant there",
    "naïve straße Привет мир 你好 世界 here and there and everywhere the same",
] * 3  # fmt: skip


def byte_level():
    """Tokens and merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    saved = json.loads(tokenizer.to_str())["model"]
    return sorted(saved["vocab"], key=saved["vocab"].get), [" ".join(merge) for merge in saved["merges"]]


def pieces():
    """Tokens, scores and kinds as SentencePiece gives them: bytes, pieces by rank, characters behind them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(vocab_size=220, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    found = sorted(vocab, key=vocab.get)
    merged = [text for text in found if len(text) > 1]
    made = [(text, -float(rank)) for rank, text in enumerate(merged + [text for text in found if len(text) == 1])]
    rows = [("<unk>", 0.0, TokenType.UNKNOWN), ("<s>", 0.0, TokenType.CONTROL), ("</s>", 0.0, TokenType.CONTROL)]
    rows += [(f"<0x{byte:02X}>", 0.0, TokenType.BYTE) for byte in range(256)]
    rows += [(text, score, TokenType.NORMAL) for text, score in made]
    rows += [("<|im_start|>", -1000.0, TokenType.CONTROL), ("  ", -1000.0, TokenType.USER_DEFINED)]
    rows += [("[PAD]", -1000.0, TokenType.UNUSED)]
    return rows


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(path, model, add):
    writer = GGUFWriter(path, "llama")
    writer.add_name("a small vocabulary")
    writer.add_tokenizer_model(model)
    add(writer)
    for name in ("add_context_length", "add_embedding_length", "add_block_count", "add_feed_forward_length"):
        getattr(writer, name)(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    write_and_close(writer)


def write_chat(path):
    writer = GGUFWriter(path, "qwen3")
    writer.add_name("a small chat model")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_tokenizer_model("gpt2")
    add_bytes(writer, "qwen2")
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template([{"name": "default", "template": TEMPLATE}, {"name": "brief", "template": "{{ bos_token }}"}])
    add_tensors(writer, np.random.default_rng(3), MODEL_ARCH.QWEN3, vocabulary=len(byte_level()[0]))
    write_and_close(writer)


def write_bytes(path, kind):
    write(path, "gpt2", lambda writer: add_bytes(writer, kind))


def add_bytes(writer, kind):
    tokens, merges = byte_level()
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(2)


def write_pieces(path, prefix):
    rows = pieces()

    def add(writer):
        writer.add_tokenizer_pre("default")
        writer.add_token_list([row[0] for row in rows])
        writer.add_token_scores([row[1] for row in rows])
        writer.add_token_types([row[2] for row in rows])
        writer.add_add_space_prefix(prefix)
        writer.add_add_eos_token(False)

    write(path, "llama", add)


def ids(path):
    model = Llama(str(path), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS]


def main(folder):
    expected = {"texts": TEXTS, "kinds": {}}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "vocabulary.gguf"
        for kind in KINDS:
            write_bytes(path, kind)
            expected["kinds"][kind] = ids(path)
        for name, prefix in [("pieces", True), ("pieces_without_space", False)]:
            write_pieces(path, prefix)
            expected[name] = ids(path)
    write_bytes(folder / "bytes.gguf", "default")
    write_pieces(folder / "pieces.gguf", True)
    write_chat(folder / "chat.gguf")
    lines = json.dumps(expected, ensure_ascii=False, separators=(",", ":")).replace("]],", "]],\n")
    (folder / "tokens.json").write_text(lines + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
