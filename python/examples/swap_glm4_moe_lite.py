"""Opens a GLM-4.7-Flash model, latent attention and experts, in 4 bits, without ever holding it in full precision.

python swap_glm4_moe_lite.py                  # a small random model
python swap_glm4_moe_lite.py path/to/glm      # a model folder: unquantised, of `metal-marlin quantize`, GPTQ, AWQ, …
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeLiteConfig

from metal_marlin import MetalQuantizedLinear, MetalQuantizedMoE, from_pretrained


def save_random_model(folder: str) -> None:
    torch.manual_seed(0)
    config = Glm4MoeLiteConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=1,
        q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
        mlp_layer_types=["dense", "sparse", "sparse"], n_group=1,
        topk_group=1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


@torch.inference_mode()
def main(folder: str, has_tokenizer: bool) -> None:
    model = from_pretrained(folder, bits=4)
    modules = [module for module in model.modules() if isinstance(module, MetalQuantizedLinear | MetalQuantizedMoE)]
    print(model.model.layers[1])
    packed, rest = sum(module.nbytes for module in modules), sum(parameter.nbytes for parameter in model.parameters())
    print(f"packed in {len(modules)} modules: {packed / 1e6:.1f} MB; embedding, head, norms, routers: {rest / 1e6:.1f} MB")

    if has_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        inputs = tokenizer(["Once upon a time", "The old man looked at the sea and"], return_tensors="pt", padding=True)
    else:
        ids = torch.arange(1, 17).reshape(2, 8)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    for row in tokens:
        print(tokenizer.decode(row, skip_special_tokens=True) if has_tokenizer else row.tolist())


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1], has_tokenizer=True)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            save_random_model(temporary)
            main(temporary, has_tokenizer=False)
