"""Swaps the experts and the linear layers of a Mixtral model for packed ones, saves it, and opens it again.

The folder that is saved is one of Metal Marlin: `metal-marlin run` serves it, Transformers opens it after `import metal_marlin`.

    python swap_mixtral.py            # a small random model, saved into a temporary folder
    python swap_mixtral.py folder     # ... into this one
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig

import metal_marlin
from metal_marlin import MetalQuantizedLinear, find_moe_layers, replace_linear_layers, replace_moe_layers


@torch.inference_mode()
def main(folder: str) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(1, 33).reshape(2, 16)
    wanted = model(ids).logits

    experts = find_moe_layers(model)
    print(f"experts: {', '.join(experts)}")
    weights = sum(parameter.nbytes for module in experts.values() for parameter in module.parameters())
    del experts
    # Experts are used seldom and bear 4 bits; attention is small, and gets 8.
    replace_moe_layers(model, bits=4)
    replace_linear_layers(model, MetalQuantizedLinear, bits=8)
    packed = sum(module.nbytes for module in find_moe_layers(model).values())
    print(f"weights of experts: {weights / 1e6:.1f} MB, packed {packed / 1e6:.1f} MB")
    found = model(ids).logits
    print(f"logits differ by {(found - wanted).norm() / wanted.norm():.1%}")

    model.save_pretrained(folder)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"saved: {size / 1e6:.1f} MB")
    # Both read the packed weights as they are.
    for opened in (AutoModelForCausalLM.from_pretrained(folder), metal_marlin.from_pretrained(folder)):
        print(f"opened again, the same logits: {torch.equal(opened(ids).logits, found)}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary)
