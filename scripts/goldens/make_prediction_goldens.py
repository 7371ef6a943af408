#!/usr/bin/env python3
"""Makes what the layers that predict further tokens (MTP) are tested against.

    pip install -r scripts/goldens/requirements.txt
    python scripts/goldens/make_prediction_goldens.py

To run after make_model_goldens.py, which leaves the layer's own tensors empty. They are drawn here, into the folder's
model.safetensors, and prediction.safetensors is written beside it, all of it in float32:

- `input_ids` (int32, [T]) and `hidden` ([T, hidden]), what the model makes of them, after its last norm;
- `logits` ([T - 1, vocabulary]) of the slots (token i + 1, hidden state of token i);
- `drafted` (int32, [3]) and `drafted_logits` ([3, vocabulary]): three tokens that follow, the most likely each time, of
  slots (token, the layer's own state of the slot before, after `shared_head.norm`).

The decoder layer, its norms, its mask and its rotary embedding are those of `transformers`: the folder is read as a model of
one layer more. How they are put together is what vLLM (glm4_moe_mtp.py, deepseek_mtp.py) and SGLang (glm4_moe_nextn.py)
agree on, and section 2.2 of DeepSeek-V3's report. A slot's place is counted from 0.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

GOLDENS = Path(__file__).resolve().parents[2] / "crates" / "marlin-model" / "tests" / "goldens"
NAMES = ["glm4moe-qknorm-mtp", "glm4moelite-shared-mtp"]
DRAFTED = 3
# Smallest difference between the two most likely tokens, and between the scores of the last expert that is chosen and the next.
GAP = 5e-3


def draw(folder, layers, seed):
    """Draws the layer's own tensors, wide enough that a wrong norm, half or order shows in the logits."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(seed)
    for name in ["eh_proj", "enorm", "hnorm", "shared_head.norm"]:
        name = f"model.layers.{layers}.{name}.weight"
        stored = tensors[name]
        if stored.dim() == 1:
            value = 0.5 + torch.rand(stored.shape, generator=generator)
        else:
            value = torch.randn(stored.shape, generator=generator) * 1.5 * stored.shape[-1] ** -0.5
        tensors[name] = value.to(stored.dtype)
    # Copies of the model's, as they are published.
    tensors[f"model.layers.{layers}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def rms_norm(x, weight, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class Predictor:
    """The layer behind the last one of a folder."""

    def __init__(self, folder):
        config = AutoConfig.from_pretrained(folder)
        options = dict(dtype=torch.float32, attn_implementation="eager")
        self.model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self.layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        config.num_hidden_layers += 1
        if getattr(config, "mlp_layer_types", None):
            config.mlp_layer_types = [*config.mlp_layer_types[: self.layers], "sparse"]
        longer = AutoModelForCausalLM.from_pretrained(folder, config=config, **options).eval()
        self.layer, self.rotary = longer.model.layers[self.layers], longer.model.rotary_emb
        own = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
        self.own = lambda name: own[f"model.layers.{self.layers}.{name}.weight"]
        self.gaps = []
        self.layer.mlp.gate.register_forward_hook(self.watch)

    def watch(self, router, _, output):
        scores = output[0].sigmoid() + router.e_score_correction_bias
        values = scores.sort(descending=True).values
        self.gaps.append((values[:, router.top_k - 1] - values[:, router.top_k]).min().item())

    def hidden(self, input_ids):
        """What the model makes of tokens, after its last norm."""
        return self.model.model(input_ids[None]).last_hidden_state[0]

    def __call__(self, tokens, before):
        """The layer's states after its norm, and logits, of slots of tokens and the hidden states before them."""
        embedded = rms_norm(self.model.model.embed_tokens(tokens), self.own("enorm"), self.eps)
        joined = torch.cat([embedded, rms_norm(before, self.own("hnorm"), self.eps)], dim=-1)
        x = (joined @ self.own("eh_proj").T)[None]
        places = torch.arange(len(tokens))[None]
        mask = torch.full((len(tokens), len(tokens)), -torch.inf).triu(1)[None, None]
        x = self.layer(x, attention_mask=mask, position_ids=places, position_embeddings=self.rotary(x, places))
        x = x[0] if isinstance(x, tuple) else x
        states = rms_norm(x[0], self.own("shared_head.norm"), self.eps)
        return states, states @ self.model.lm_head.weight.T


@torch.no_grad()
def make(name, seed):
    folder = GOLDENS / name
    input_ids = load_file(folder / "golden.safetensors")["input_ids"]
    while True:
        draw(folder, AutoConfig.from_pretrained(folder).num_hidden_layers, seed)
        predict = Predictor(folder)
        hidden = predict.hidden(input_ids.long())
        tokens, before = input_ids[1:].long(), hidden[:-1]
        states, logits = predict(tokens, before)
        drafted, drafted_logits = [], []
        # A guess follows the last slot, which stands for a token that is not there yet.
        last, last_logits = states[-1], logits[-1]
        for _ in range(DRAFTED):
            token = last_logits.argmax()
            tokens, before = torch.cat([tokens, token[None]]), torch.cat([before, last[None]])
            more_states, more_logits = predict(tokens, before)
            last, last_logits = more_states[-1], more_logits[-1]
            drafted.append(token)
            drafted_logits.append(last_logits)
        top = torch.cat([logits, torch.stack(drafted_logits)]).topk(2).values
        gap = min(*predict.gaps, (top[-1 - DRAFTED :, 0] - top[-1 - DRAFTED :, 1]).min().item())
        if gap > GAP:
            break
        seed += 100
    golden = {
        "input_ids": input_ids,
        "hidden": hidden,
        "logits": logits,
        "drafted": torch.stack(drafted).to(torch.int32),
        "drafted_logits": torch.stack(drafted_logits),
    }
    save_file({key: value.contiguous() for key, value in golden.items()}, folder / "prediction.safetensors")
    print(f"{name}: seed {seed}, logits of standard deviation {logits.std():.2f}, apart by {gap:.4f}")


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if sys.argv[1:]:
        sys.exit("no arguments")
    for seed, name in enumerate(NAMES):
        make(name, seed)


if __name__ == "__main__":
    main()
