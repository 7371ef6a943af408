"""Tiny random models under the names of published checkpoints, for the scripts that quantise them with the
packages of others."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from make_model_goldens import ROUTER_GAP, randomise, run
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeLiteForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

VOCABULARY, TOKENS, CALIBRATION_TEXTS = 32, 12, 16
COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=False,
    pad_token_id=None,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0),
)
SHAPES = {
    "llama": (LlamaForCausalLM, dict(num_key_value_heads=1)),
    "qwen3": (Qwen3ForCausalLM, dict(num_key_value_heads=1, head_dim=16)),
    "qwen3moe": (
        Qwen3MoeForCausalLM,
        dict(
            num_key_value_heads=1,
            head_dim=16,
            moe_intermediate_size=32,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
    ),
    # As GLM-4.7-Flash: latent attention, whose kv_a_proj_with_mqa has an odd number of rows, and a shared expert.
    "glm4moelite": (
        Glm4MoeLiteForCausalLM,
        dict(
            num_key_value_heads=2,
            moe_intermediate_size=32,
            n_shared_experts=1,
            n_routed_experts=4,
            num_experts_per_tok=2,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=0,
            mlp_layer_types=["sparse"],
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.8,
            norm_topk_prob=True,
        ),
    ),
}


def model(shape, **changes):
    """A model of one layer, in f32."""
    model_class, arguments = SHAPES[shape]
    torch.manual_seed(list(SHAPES).index(shape))
    made = model_class(model_class.config_class(**COMMON | arguments | changes)).eval()
    made.config.architectures = [model_class.__name__]
    randomise(made)
    return made


def stored(model):
    """config.json and tensors as they are published."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return json.loads(Path(folder, "config.json").read_text()), load_file(Path(folder, "model.safetensors"))


def save_source(model, folder):
    """A folder for packages that load one: they ask for a tokenizer, too."""
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="1", eos_token="2", unk_token="0").save_pretrained(folder)


def calibration():
    """Token ids `[texts, tokens]`."""
    return torch.randint(VOCABULARY, (CALIBRATION_TEXTS, 32), generator=torch.Generator().manual_seed(1))


def linears(tensors):
    """The modules that packages quantise: all linears but head and router."""
    matrices = (name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dim() == 2)
    return [name for name in matrices if not name.endswith(("embed_tokens", "lm_head", ".gate"))]


def write(folder, config, tensors, expected):
    """A folder, and beside it the values that the package decodes it to."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_expected(folder, expected)


def write_expected(folder, expected):
    expected = {name: tensor.float().contiguous() for name, tensor in expected.items()}
    save_file(expected, folder / "expected.safetensors", {"format": "pt"})


def save(folder, config, tensors, expected, oracle=None):
    """A model's folder, and beside it what the package decodes it to, and its logits."""
    write(folder, config, tensors, expected)
    write_logits(folder, oracle)


def add_expected(folder, expected, oracle=None):
    """Beside a folder that a package wrote, what it decodes it to, and the logits."""
    for file in folder.iterdir():
        if file.name not in ("config.json", "hf_quant_config.json", "model.safetensors"):
            file.unlink()
    write_expected(folder, expected)
    write_logits(folder, oracle)


def write_logits(folder, oracle):
    """Those that `transformers` computes in f32 from the decoded weights; or from the folder itself, which `oracle` loads."""
    loaded = (oracle or load_decoded)(folder)
    loaded = loaded.eval()
    assert all(tensor.dtype == torch.float32 for tensor in loaded.parameters())
    generator, gap = torch.Generator().manual_seed(2), 0
    while gap < ROUTER_GAP:
        input_ids = torch.randint(VOCABULARY, (1, TOKENS), generator=generator)
        logits, gap = run(loaded, input_ids)
    save_file({"input_ids": input_ids[0].int(), "logits": logits.contiguous()}, folder / "golden.safetensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1024:.0f} KiB, logits of standard deviation {logits.std():.2f}, experts apart by {gap:.4f}")


def load_decoded(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    with tempfile.TemporaryDirectory() as dense:
        Path(dense, "config.json").write_text(json.dumps(config))
        shutil.copy(folder / "expected.safetensors", Path(dense, "model.safetensors"))
        options = dict(dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
        loaded, report = AutoModelForCausalLM.from_pretrained(dense, **options)
    assert not any(report.values()), report
    return loaded
