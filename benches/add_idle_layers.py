"""Gives a model with a prediction layer more layers, which add nothing to what it says: a small model then costs what a larger one does, and guesses as it did.

    python3 benches/add_idle_layers.py MODEL OUT LAYERS

The new layers are copies of the first one, a dense one in GLM's mixtures, whose outputs are zero; they stand behind it, and all others move on. Needs
safetensors and torch. Made for what benches/train_prediction_layer.py writes; docs/speculation.md has figures.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

PREFIX, FIRST = "model.layers.", "model.layers.0."
WRITES = ("o_proj.weight", "down_proj.weight")


def moved(name, more):
    """The name that a tensor has when `more` layers stand behind the first."""
    if not name.startswith(PREFIX) or name.startswith(FIRST):
        return name
    layer, rest = name.removeprefix(PREFIX).split(".", 1)
    return f"{PREFIX}{int(layer) + more}.{rest}"


def main():
    source, out, more = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    index = json.loads((source / "model.safetensors.index.json").read_text())
    tensors = {}
    for file in sorted(set(index["weight_map"].values())):
        tensors |= load_file(source / file)
    grown = {moved(name, more): value for name, value in tensors.items()}
    for name, value in tensors.items():
        if name.startswith(FIRST):
            value = torch.zeros_like(value) if name.endswith(WRITES) else value
            for layer in range(1, more + 1):
                grown[f"{PREFIX}{layer}.{name.removeprefix(FIRST)}"] = value.clone()

    shutil.copytree(source, out, ignore=shutil.ignore_patterns("model*"))
    save_file(grown, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] += more
    if types := config.get("mlp_layer_types"):
        config["mlp_layer_types"] = types[:1] * more + types
    if config.get("first_k_dense_replace"):
        config["first_k_dense_replace"] += more
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
