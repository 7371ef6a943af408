"""Swaps the linear layers of a Qwen3 model for packed ones, in memory, and looks at what that costs and saves.

python swap_qwen3.py                    # a small random model
python swap_qwen3.py path/to/qwen3      # a model folder
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config

from metal_marlin import MetalQuantizedLinear, replace_linear_layers


def load(folder: str | None) -> PreTrainedModel:
    if folder is not None:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def megabytes(model: PreTrainedModel) -> float:
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, MetalQuantizedLinear))
    return (packed + sum(parameter.nbytes for parameter in model.parameters())) / 1e6


@torch.inference_mode()
def main(folder: str | None = None) -> None:
    model = load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder) if folder is not None else None
    prompt = "The capital of France is"
    ids = tokenizer(prompt, return_tensors="pt").input_ids if tokenizer is not None else torch.arange(1, 17)[None]

    before, wanted = megabytes(model), model(ids).logits
    replace_linear_layers(model, MetalQuantizedLinear, bits=4)
    found = model(ids).logits

    print(model.model.layers[0].self_attn)
    print(f"weights: {before:.1f} MB, packed {megabytes(model):.1f} MB (embedding and head are kept as they were)")
    print(f"logits differ by {(found - wanted).norm() / wanted.norm():.1%}: what 4 bits cost")
    print(f"most likely token is the same at {(found.argmax(-1) == wanted.argmax(-1)).float().mean():.0%} of positions")

    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    print(
        tokenizer.decode(tokens[0], skip_special_tokens=True)
        if tokenizer is not None
        else f"tokens: {tokens[0, ids.shape[1] :].tolist()}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
