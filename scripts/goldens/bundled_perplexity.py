"""Perplexity of the bundled model by `transformers`: decodes the packed weights with numpy, as docs/formats.md describes them,
and measures the first windows of data/text/validation.txt.

    python scripts/goldens/bundled_perplexity.py [--context 32] [--windows 4]

Prints the figure that crates/metal-marlin/tests/quantize_and_eval.rs expects. Requirements: requirements.txt beside this file.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "crates/metal-marlin/model"
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def decode(scheme: dict, shape: list[int], codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The weights of a packed matrix of the two schemes that the bundled model uses."""
    rows, cols = shape
    if scheme["element"] == "e2m1":
        values = E2M1[np.stack([codes & 15, codes >> 4], axis=-1).reshape(rows, cols)]
    else:
        assert scheme["element"] == {"int": 8}, scheme
        values = codes.astype(np.float32) - 128
    group = scheme["grouping"]["columns"]
    return values * np.repeat(scales.astype(np.float32), group, axis=1)[:, :cols]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()

    config = json.loads((MODEL / "config.json").read_text())
    packed = config.pop("quantization_config")
    tensors = load_file(MODEL / "model.safetensors")
    weights = {}
    for name, tensor in tensors.items():
        if name in packed["tensors"]:
            entry = packed["tensors"][name]
            tensor = decode(packed["schemes"][entry["scheme"]], entry["shape"], tensor.numpy(), tensors[f"{name}_scale"].numpy())
        elif name.rsplit("_", 1)[0] in packed["tensors"]:
            continue
        weights[name] = torch.as_tensor(tensor).float()

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager").float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"))
    text = (ROOT / "data/text/validation.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for window in range(args.windows):
        tokens = torch.tensor([ids[window * args.context : (window + 1) * args.context]])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].double()
        loss = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        total, count = total + loss.item(), count + tokens.shape[1] - 1
    print(f"perplexity {math.exp(total / count):.4f} over {count} tokens")


if __name__ == "__main__":
    main()
