"""Checkpoints in layouts of others, against what others compute from them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_tokens, relative_error, tiny_model, token_ids
from transformers import AutoModelForCausalLM, LlamaConfig, Mxfp4Config

from metal_marlin import MetalQuantizedEmbedding, MetalQuantizedLinear, MetalQuantizedMoE, from_pretrained
from metal_marlin._native import Scheme

pytestmark = pytest.mark.usefixtures("no_grad")

CRATES = Path(__file__).resolve().parents[2] / "crates"
# Tiny models with the logits that Transformers, or llama.cpp, computes of their decoded weights: scripts/goldens makes them.
GOLDENS = CRATES / "marlin-model/tests/goldens"
QUANTIZED_GOLDENS = CRATES / "marlin-checkpoint/tests/goldens"
GGUF_GOLDENS = CRATES / "marlin-model/tests/gguf"
LLAMA_CPP_GOLDENS = CRATES / "marlin-model/tests/llama_cpp"

# Models, and where their logits are.
PACKED = {
    **{folder: folder for layout in ("gptq", "awq", "fp8", "modelopt", "llmcompressor")
       for folder in sorted((QUANTIZED_GOLDENS / layout).iterdir()) if (folder / "golden.safetensors").exists()},
    **{folder: folder for folder in sorted(GOLDENS.glob("mlx-*"))},
    GOLDENS / "gptoss-mxfp4": GOLDENS / "gptoss-mxfp4",
    GGUF_GOLDENS / "gptoss-mxfp4.gguf": GOLDENS / "gptoss-mxfp4",
    **{file: file.parent for file in sorted(LLAMA_CPP_GOLDENS.glob("*/model.gguf"))},
}  # fmt: skip
PLAIN = {
    **{golden.parent: golden.parent for golden in sorted(GOLDENS.glob("*/golden.safetensors"))},
    **{file: GOLDENS / file.stem for file in sorted(GGUF_GOLDENS.glob("*.gguf"))},
}
PLAIN = {model: golden for model, golden in PLAIN.items() if model not in PACKED}


def name(path):
    return "/".join(path.parts[-2:])


def schemes(model):
    """How the packed matrices of a model are stored."""
    found = set()
    for module in model.modules():
        if isinstance(module, MetalQuantizedLinear | MetalQuantizedEmbedding):
            found.add(module.scheme)
        elif isinstance(module, MetalQuantizedMoE):
            found.update(scheme for expert in module.schemes for scheme in expert)
    return found


def logits_error(model, golden):
    """How far its logits are from those of a golden folder."""
    wanted = load_file(golden / "golden.safetensors")
    return relative_error(model(wanted["input_ids"][None].long()).logits[0], wanted["logits"])


def test_there_are_goldens_of_every_layout():
    layouts = {model.parent.name for model in PACKED}
    assert layouts >= {"gptq", "awq", "fp8", "modelopt", "llmcompressor", "goldens", "gguf", "llama-q4_k_m"}
    assert len(PACKED) >= 36
    assert len(PLAIN) >= 51


@pytest.mark.parametrize(("model", "golden"), PACKED.items(), ids=map(name, PACKED))
def test_packed_matrices_compute_what_others_decode_them_to(model, golden):
    opened = from_pretrained(model, activations="f32", dtype=torch.float32)
    assert any(not scheme.is_dense for scheme in schemes(opened))
    assert logits_error(opened, golden) < 1e-5


@pytest.mark.parametrize(("model", "golden"), PLAIN.items(), ids=map(name, PLAIN))
def test_plain_matrices_compute_what_transformers_does(model, golden):
    opened = from_pretrained(model, format="f32", skip=(), activations="f32", dtype=torch.float32)
    assert schemes(opened) == {Scheme.of("f32")}
    # Gemma's logits are of an embedding's scale that is rounded to bf16 or f16.
    assert logits_error(opened, golden) < (1e-3 if "gemma3" in golden.name else 1e-5)


def padded(model):
    """Inputs of two rows, one of which is shorter."""
    ids = token_ids(model)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def write_gpt_oss(folder):
    """A tiny gpt-oss with random experts, as it is published."""
    tiny_model("gpt_oss").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for expert in [tensor for tensor in tensors if tensor.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(expert).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{expert}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator)
        tensors[f"{expert}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"modules_to_not_convert": kept, "quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))


def test_gpt_oss_as_published_computes_what_transformers_decodes_it_to(tmp_path):
    write_gpt_oss(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    ).requires_grad_(False)
    model = from_pretrained(tmp_path, activations="f32")
    assert schemes(model) == {Scheme.of("mxfp4")}
    for layer, experts in enumerate(reference.model.layers):
        stored = model.model.layers[layer].mlp.experts.dequantize()
        assert torch.equal(stored["gate_up_proj"], experts.mlp.experts.gate_up_proj)
        assert torch.equal(stored["down_proj"], experts.mlp.experts.down_proj)
    inputs = padded(model)
    shown = inputs["attention_mask"].bool()
    assert relative_error(model(**inputs).logits[shown], reference(**inputs).logits[shown]) < 1e-5
    assert_same_tokens(model, reference, **inputs)
    # Experts go out one by one, and are the same.
    model.save_pretrained(tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved", activations="f32")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def decode_mlx(folder):
    """A folder of MLX in 4 bits as a model of Transformers: w = scale * code + bias, each in groups of 32 columns."""
    stored = load_file(folder / "model.safetensors")
    weights = {}
    for tensor, value in stored.items():
        module, _, part = tensor.rpartition(".")
        if f"{module}.scales" not in stored:
            weights[tensor] = value.float()
        elif part == "weight":
            # Eight codes in a word, the first one in the lowest bits.
            codes = value.view(torch.int32)[..., None] >> torch.arange(0, 32, 4) & 15
            scales, biases = (stored[f"{module}.{part}"].float()[..., None] for part in ("scales", "biases"))
            weights[tensor] = (scales * codes.reshape(*scales.shape[:-1], 32) + biases).flatten(1)
    fields = json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(fields), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    return model.eval().requires_grad_(False)


def test_mlx_computes_what_its_codes_scales_and_biases_say():
    folder = GOLDENS / "mlx-llama-u4-tied"
    reference = decode_mlx(folder)
    model = from_pretrained(folder, activations="f32", dtype=torch.float32)
    (scheme,) = schemes(model)
    assert "bias" in str(scheme)
    assert isinstance(model.get_input_embeddings(), MetalQuantizedEmbedding)
    for layer, packed in model.named_modules():
        if isinstance(packed, MetalQuantizedLinear | MetalQuantizedEmbedding):
            assert torch.equal(packed.dequantize(), reference.get_submodule(layer).weight)
    inputs = padded(model)
    shown = inputs["attention_mask"].bool()
    assert relative_error(model(**inputs).logits[shown], reference(**inputs).logits[shown]) < 1e-5
    assert_same_tokens(model, reference, **inputs)


def test_latent_attention_of_mlx_goes_out_as_transformers_has_it(tmp_path):
    model = from_pretrained(GOLDENS / "mlx-glm4moelite-u8", activations="f32", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.kv_b_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert logits_error(from_pretrained(tmp_path, activations="f32"), GOLDENS / "mlx-glm4moelite-u8") < 1e-5


def test_weights_that_are_missing_are_named(tmp_path):
    source = GOLDENS / "mlx-glm4moelite-u8"
    stored = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())

    def without(part):
        save_file({tensor: value for tensor, value in stored.items() if part not in tensor}, tmp_path / "model.safetensors")
        return from_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"lacks unembed_out\.0 and 1 more .*layers\.1\.self_attn\.kv_b_proj"):
        without("layers.1.self_attn.unembed_out")
    with pytest.raises(ValueError, match=r"lacks model\.layers\.0\.input_layernorm\.weight, which .*MarlinPipeline"):
        without("layers.0.input_layernorm")
