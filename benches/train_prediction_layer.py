"""Trains a prediction layer (MTP) for a small GLM-4.7-Flash, so that `--speculate mtp` can be measured with weights that mean something.

    python3 benches/train_prediction_layer.py MODEL TEXT OUT [--minutes 6] [--validation TEXT]

Everything else stays as it is. The layer begins as a copy of the last one, and learns to say what the model says one token further (the cross entropy with the
model's own probabilities), over windows of the text. OUT is a copy of the model's folder with the layer in a file of its own. Needs torch,
transformers and safetensors; one thread, a few minutes. docs/speculation.md has figures.
"""

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

WINDOW, BATCH = 128, 4


class Predictor(torch.nn.Module):
    """Slots (token i + 1, hidden state of token i) to the layer's states after its norm."""

    def __init__(self, folder, model):
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        self.index, self.eps = config.num_hidden_layers, config.rms_norm_eps
        config.num_hidden_layers += 1
        config.mlp_layer_types = [*config.mlp_layer_types, "sparse"]
        longer = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        self.layer, self.rotary = longer.model.layers[-1], longer.model.rotary_emb
        self.layer.load_state_dict(model.model.layers[-1].state_dict())
        hidden = config.hidden_size
        self.enorm = torch.nn.Parameter(torch.ones(hidden))
        self.hnorm = torch.nn.Parameter(torch.ones(hidden))
        self.norm = torch.nn.Parameter(model.model.norm.weight.detach().clone())
        # The scale of the residual stream before the last layer, roughly.
        self.eh_proj = torch.nn.Parameter(torch.cat([torch.eye(hidden), torch.eye(hidden)], dim=1))
        self.embed = model.model.embed_tokens

    def normed(self, x, weight):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, self.eps)

    def forward(self, tokens, before):
        embedded = self.normed(self.embed(tokens).detach(), self.enorm)
        x = torch.cat([embedded, self.normed(before, self.hnorm)], dim=-1) @ self.eh_proj.T
        places = torch.arange(tokens.shape[1])[None]
        mask = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)[None, None]
        x = self.layer(x, attention_mask=mask, position_ids=places, position_embeddings=self.rotary(x, places))
        return self.normed(x[0] if isinstance(x, tuple) else x, self.norm)

    def tensors(self):
        """As checkpoints have them: a matrix for each expert."""
        name = f"model.layers.{self.index}."
        own = {"enorm": self.enorm, "hnorm": self.hnorm, "eh_proj": self.eh_proj, "shared_head.norm": self.norm}
        tensors = {f"{name}{key}.weight": value for key, value in own.items()}
        for key, value in self.layer.state_dict().items():
            if key == "mlp.experts.gate_up_proj":
                for expert, halves in enumerate(value):
                    gate, up = halves.chunk(2)
                    tensors[f"{name}mlp.experts.{expert}.gate_proj.weight"] = gate
                    tensors[f"{name}mlp.experts.{expert}.up_proj.weight"] = up
            elif key == "mlp.experts.down_proj":
                for expert, down in enumerate(value):
                    tensors[f"{name}mlp.experts.{expert}.down_proj.weight"] = down
            else:
                tensors[name + key] = value
        exact = "e_score_correction_bias"
        return {
            key: value.detach().to(torch.float32 if key.endswith(exact) else torch.bfloat16).contiguous()
            for key, value in tensors.items()
        }


def windows(tokenizer, text):
    ids = torch.tensor(tokenizer.encode(text.read_text(), add_special_tokens=False).ids)
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def batch_of(model, tokens):
    """Slots, the hidden states before them, and the model's logits behind them."""
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        return tokens[:, 1:], hidden[:, :-1], hidden[:, 1:] @ model.lm_head.weight.T


@torch.no_grad()
def agreement(model, predictor, validation):
    """How often the layer's first choice is the model's, and that of its own continuation one further."""
    firsts = []
    for tokens in validation[:32].split(8):
        slots, before, wanted = batch_of(model, tokens)
        states = predictor(slots, before)
        firsts.append(((states @ model.lm_head.weight.T).argmax(-1) == wanted.argmax(-1)).float().mean())
    return torch.stack(firsts).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--validation", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    options = dict(dtype=torch.float32, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **options).eval().requires_grad_(False)
    predictor = Predictor(arguments.model, model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    data = windows(tokenizer, arguments.text)
    validation = windows(tokenizer, arguments.validation) if arguments.validation else None
    trained = [parameter for name, parameter in predictor.named_parameters() if not name.startswith("embed")]
    for parameter in trained:
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    started, step, order = time.time(), 0, []
    while (share := (time.time() - started) / (60 * arguments.minutes)) < 1:
        if len(order) < BATCH:
            order = torch.randperm(len(data)).tolist()
        tokens = data[[order.pop() for _ in range(BATCH)]]
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * min(1.0, 2 * (1 - share) + 0.02)
        slots, before, wanted = batch_of(model, tokens)
        logits = predictor(slots, before) @ model.lm_head.weight.T
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.softmax(-1).flatten(0, 1))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {time.time() - started:.0f} s", flush=True)
    if validation is not None:
        print(f"says what the model says in {100 * agreement(model, predictor, validation):.1f} % of places")

    shutil.copytree(arguments.model, arguments.out, copy_function=shutil.copyfile)
    for path in [arguments.out, *arguments.out.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    tensors, file = predictor.tensors(), "model-prediction.safetensors"
    save_file(tensors, arguments.out / file, metadata={"format": "pt"})
    index_file, config_file = (arguments.out / name for name in ["model.safetensors.index.json", "config.json"])
    index, config = (json.loads(path.read_text()) for path in [index_file, config_file])
    index["weight_map"] |= {name: file for name in tensors}
    index_file.write_text(json.dumps(index, indent=2) + "\n")
    config["num_nextn_predict_layers"] = 1
    config_file.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
