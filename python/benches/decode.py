"""Decoding inside Transformers, torch's layers against packed ones, on a random model of Qwen3-0.6B's shape.

    python decode.py [--threads 2] [--rounds 5] [--tokens 32] [--layers 28] [--skip-head] [--memory]

Every round decodes with each variant in turn, so that what else the machine does falls on all of them; figures are medians.
`--memory` measures resident memory instead, of a process that makes the model, swaps its layers and decodes.
"""

import argparse
import copy
import gc
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from metal_marlin import MetalQuantizedLinear, replace_linear_layers
from metal_marlin.replace import DEFAULT_SKIP


def random_model(layers: int, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


@torch.inference_mode()
def tokens_per_second(model: PreTrainedModel, tokens: int) -> float:
    """Of decoding after a prompt of 16 tokens, whose own time is not counted."""
    ids = torch.arange(1, 17)[None]
    output = model(ids, use_cache=True)
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    start = time.perf_counter()
    for _ in range(tokens):
        output = model(token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return tokens / (time.perf_counter() - start)


def swapped(model: PreTrainedModel, activations: str, skip: tuple[str, ...]) -> PreTrainedModel:
    # How well weights are rounded changes nothing here, and "absmax" is quick.
    return replace_linear_layers(
        copy.deepcopy(model), MetalQuantizedLinear, bits=4, format="fp4", skip=skip, search="absmax", activations=activations
    )


def measure_speed(arguments: argparse.Namespace, skip: tuple[str, ...]) -> None:
    in_bf16 = random_model(arguments.layers, torch.bfloat16)
    in_f32 = copy.deepcopy(in_bf16).float()
    packed = swapped(in_bf16, "int8", skip)
    variants = {
        "torch bf16": in_bf16,
        "torch f32": in_f32,
        "fp4, int8 activations, rest bf16": packed,
        # Copies share what is packed.
        "fp4, int8 activations, rest f32": torch.nn.Module.float(copy.deepcopy(packed)),
        "fp4, f32 activations, rest f32": swapped(in_f32, "f32", skip),
    }
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for model in variants.values():
        tokens_per_second(model, 2)
    for _ in range(arguments.rounds):
        for name, model in variants.items():
            speeds[name].append(tokens_per_second(model, arguments.tokens))
    medians = {name: statistics.median(of) for name, of in speeds.items()}
    best = max(medians["torch bf16"], medians["torch f32"])
    for name, median in medians.items():
        print(
            f"{name:34} {median:7.2f} tokens/s  ({min(speeds[name]):.2f}-{max(speeds[name]):.2f})  "
            f"{median / best:.2f}x the faster of torch"
        )


def measure_memory(arguments: argparse.Namespace, skip: tuple[str, ...]) -> None:
    baseline = resident()
    model = random_model(arguments.layers, torch.bfloat16)
    print(f"model in bf16: {resident() - baseline:.0f} MB resident")
    replace_linear_layers(model, MetalQuantizedLinear, bits=4, format="fp4", skip=skip)
    gc.collect()
    tokens_per_second(model, 4)
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, MetalQuantizedLinear)) / 1e6
    rest = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    print(
        f"after the swap: {resident() - baseline:.0f} MB resident; "
        f"packed {packed:.0f} MB + unquantised {rest:.0f} MB = {packed + rest:.0f} MB"
    )


def resident() -> float:
    """Megabytes of this process in memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith("VmRSS"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--skip-head", action="store_true", help="leave the head, which is tied to the embedding, as it is")
    parser.add_argument("--memory", action="store_true", help="measure resident memory instead of speed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    skip = DEFAULT_SKIP if arguments.skip_head else tuple(pattern for pattern in DEFAULT_SKIP if pattern != "lm_head")
    (measure_memory if arguments.memory else measure_speed)(arguments, skip)


if __name__ == "__main__":
    main()
