"""Folders in and out of Transformers."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CONFIGS, dequantized_like, relative_error, tiny_model, token_ids, trained_model_folder
from torch import nn
from transformers import AutoModelForCausalLM

from metal_marlin import (
    MetalMarlinConfig,
    MetalQuantizedEmbedding,
    MetalQuantizedLinear,
    MetalQuantizedMoE,
    find_moe_layers,
    from_pretrained,
    replace_linear_layers,
    replace_moe_layers,
    set_activations,
)
from metal_marlin._native import Checkpoint, Matrix, Scheme

pytestmark = pytest.mark.usefixtures("no_grad")


def quantize(model, **options):
    """Packs a model in place."""
    model = replace_linear_layers(model, MetalQuantizedLinear, **options)
    return replace_moe_layers(model, **options) if find_moe_layers(model) else model


def logits(model):
    return model(token_ids(model)).logits


def fields(folder):
    return json.loads((folder / "config.json").read_text())


def load(folder, **options):
    """As Transformers does, and nothing missing or too much."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_save_pretrained_writes_a_checkpoint_that_everybody_opens(family, tmp_path):
    model = quantize(tiny_model(family), format="fp4")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # Once more, from a model that was loaded.
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    assert fields(tmp_path / "again")["quantization_config"] == fields(tmp_path)["quantization_config"]
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("family", CONFIGS)
def test_quantised_while_loading(family, tmp_path):
    original = tiny_model(family)
    original.save_pretrained(tmp_path)
    wanted = quantize(copy.deepcopy(original), format="int4", group_size=32)
    config = MetalMarlinConfig(format="int4", group_size=32)
    loaded = load(tmp_path, quantization_config=config)
    assert torch.equal(logits(loaded), logits(wanted))
    assert torch.equal(logits(from_pretrained(tmp_path, format="int4", group_size=32)), logits(wanted))
    loaded.save_pretrained(tmp_path / "packed")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(wanted))


def test_experts_saved_in_one_tensor_are_quantised_while_loading(tmp_path):
    original = tiny_model("qwen3_moe")
    original.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    wanted = logits(quantize(original, bits=4))
    assert torch.equal(logits(from_pretrained(tmp_path, bits=4)), wanted)
    assert torch.equal(logits(load(tmp_path, quantization_config=MetalMarlinConfig(bits=4))), wanted)


def test_names_of_mixtral_are_those_of_its_checkpoints(tmp_path):
    quantize(tiny_model("mixtral"), bits=4).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    assert {name, f"{name}_scale", "model.layers.0.block_sparse_moe.gate.weight"} <= stored.keys()
    assert fields(tmp_path)["quantization_config"]["tensors"][name]["shape"] == [64, 96]
    # Or those that Transformers has in memory.
    model = from_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    names = load_file(tmp_path / "memory" / "model.safetensors").keys()
    assert "model.layers.0.mlp.gate.weight" in names


def test_config_has_what_the_program_reads_and_no_more(tmp_path):
    quantize(tiny_model("llama"), bits=4).save_pretrained(tmp_path)
    found = fields(tmp_path)["quantization_config"]
    assert found.keys() == {"quant_method", "version", "schemes", "tensors"}
    assert (found["quant_method"], found["version"]) == ("metal-marlin", 1)
    assert [Scheme.from_json(json.dumps(scheme)) for scheme in found["schemes"].values()] == [Scheme.of("fp4")]
    checkpoint = Checkpoint.open(str(tmp_path))
    name = "model.layers.1.mlp.down_proj.weight"
    assert checkpoint.info(name) == ([64, 96], Scheme.of("fp4"))


def test_mixed_formats_survive(tmp_path):
    model = replace_linear_layers(tiny_model("llama"), MetalQuantizedLinear, bits=8, skip=["lm_head", "mlp.*"])
    replace_linear_layers(model, MetalQuantizedLinear, format="mxfp4")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.model.layers[0].self_attn.q_proj.scheme == Scheme.of("int8")
    assert loaded.model.layers[0].mlp.up_proj.scheme == Scheme.of("mxfp4")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("family", ["qwen3", "gpt_oss"])
def test_activations_of_a_model_that_transformers_opened(family, tmp_path):
    quantize(tiny_model(family), bits=4).save_pretrained(tmp_path)
    model = load(tmp_path)
    rounded, exact = logits(model), logits(from_pretrained(tmp_path, activations="f32"))
    assert not torch.equal(rounded, exact)
    other = copy.deepcopy(model)
    assert set_activations(model, "f32") is model
    assert torch.equal(logits(model), exact)
    assert torch.equal(logits(other), rounded)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), exact)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert torch.equal(logits(set_activations(model, "int8")), rounded)
    with pytest.raises(ValueError, match="activations must be one of 'int8', 'f32', found 'bf16'"):
        set_activations(model, "bf16")
    with pytest.raises(ValueError, match="activations must be one of"):
        MetalQuantizedLinear(32, 8).set_activations("bf16")
    assert torch.equal(logits(model), rounded)
    with pytest.raises(ValueError, match="Linear has no quantised layer"):
        set_activations(nn.Linear(2, 2), "f32")


def test_dtype_is_of_what_is_not_packed(tmp_path):
    quantize(tiny_model("qwen3"), bits=4).save_pretrained(tmp_path)
    for model in (load(tmp_path, dtype=torch.bfloat16), from_pretrained(tmp_path, dtype=torch.bfloat16)):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.model.layers[0].self_attn.q_proj.weight.dtype is torch.bfloat16
        assert logits(model).dtype is torch.bfloat16


def test_dequantize(tmp_path):
    quantize(tiny_model("llama"), bits=4, activations="f32").save_pretrained(tmp_path)
    model = load(tmp_path)
    wanted = logits(from_pretrained(tmp_path, activations="f32"))
    model.dequantize()
    assert not any(isinstance(module, MetalQuantizedLinear) for module in model.modules())
    assert relative_error(logits(model), wanted) < 1e-4
    model.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in fields(tmp_path / "plain")
    with pytest.raises(NotImplementedError, match=r"mlp\.experts is none: load the original"):
        quantize(tiny_model("mixtral"), bits=4).dequantize()


def test_shards(tmp_path):
    model = quantize(tiny_model("qwen3_moe"), bits=4)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_an_untied_head_is_saved(tmp_path):
    model = quantize(tiny_model("qwen3"), bits=8, skip=())
    assert isinstance(model.lm_head, MetalQuantizedLinear)
    model.save_pretrained(tmp_path)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(tmp_path / "model.safetensors").keys()
    for loaded in (load(tmp_path), from_pretrained(tmp_path)):
        assert isinstance(loaded.lm_head, MetalQuantizedLinear)
        assert torch.equal(logits(loaded), logits(model))


def test_a_tied_head_is_quantised_while_loading_unless_it_is_skipped(tmp_path):
    original = tiny_model("qwen3")
    original.save_pretrained(tmp_path)
    wanted = logits(quantize(original, bits=8, skip=()))
    assert torch.equal(logits(from_pretrained(tmp_path, bits=8, skip=())), wanted)
    assert torch.equal(logits(load(tmp_path, quantization_config=MetalMarlinConfig(bits=8, skip=()))), wanted)


def pack_embedding(model, scheme):
    """Packs the embedding of a model, and its head with it if the two are tied."""
    name = "model.embed_tokens"
    table = model.get_submodule(name)
    scale = getattr(table, "scalar_embed_scale", None)
    embedding = MetalQuantizedEmbedding(*table.weight.shape, scheme, dtype=table.weight.dtype, embed_scale=scale)
    embedding.load_matrix(Matrix.encode(table.weight.numpy(), scheme))
    model.set_submodule(name, embedding)
    return embedding


def write_packed_embedding(model, folder):
    """A folder whose embedding is packed, and which has no head: what `quantize` makes of a model whose head is tied."""
    quantize(model, format="fp4")
    embedding = pack_embedding(model, Scheme.of("int8", 32))
    model.lm_head.weight = nn.Parameter(embedding.dequantize(), requires_grad=False)
    wanted = logits(model)
    model.hf_quantizer.tied = {"lm_head": "model.embed_tokens"}
    model.save_pretrained(folder)
    return wanted


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_packed_embedding_stays_packed_and_its_tied_head_is_the_same_matrix(family, tmp_path):
    wanted = write_packed_embedding(tiny_model(family), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["model.embed_tokens.weight"].dtype is torch.uint8
    for model in (load(tmp_path), from_pretrained(tmp_path, activations="f32")):
        assert isinstance(model.get_input_embeddings(), MetalQuantizedEmbedding)
        assert isinstance(model.lm_head, MetalQuantizedLinear)
        assert torch.equal(model.lm_head.dequantize(), model.get_input_embeddings().dequantize())
        assert relative_error(logits(model), wanted) < 0.03
        assert model.config.tie_word_embeddings
    model = load(tmp_path)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == stored.keys()
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))
    model.tie_weights()
    assert isinstance(model.lm_head, MetalQuantizedLinear)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-glm4-moe"])
def test_trained_models_are_quantised_while_loading(name, tmp_path):
    folder = trained_model_folder(name)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = from_pretrained(folder, format="fp4", search="absmax", dtype=torch.float32, activations="f32")
    assert relative_error(logits(model), logits(dequantized_like(model, original))) < 2e-3
    assert model.generation_config.eos_token_id == original.generation_config.eos_token_id
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, activations="f32")
    assert torch.equal(logits(again), logits(model))
    packed = sum(module.nbytes for module in model.modules() if isinstance(module, MetalQuantizedLinear | MetalQuantizedMoE))
    rest = sum(parameter.nbytes for parameter in model.parameters()) / 2
    assert packed + rest < 0.55 * sum(path.stat().st_size for path in folder.glob("model-*.safetensors"))


def test_rotated_checkpoints_are_for_the_engine(tmp_path):
    quantize(tiny_model("llama"), bits=4).save_pretrained(tmp_path)
    config = fields(tmp_path)
    config["quantization_config"]["rotations"] = {"hidden": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for opened in (lambda: AutoModelForCausalLM.from_pretrained(tmp_path), lambda: from_pretrained(tmp_path)):
        with pytest.raises(ValueError, match=r"rotated activations.*MarlinPipeline"):
            opened()


def test_what_cannot_be_opened(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="contradicts"):
        from_pretrained(tmp_path, bits=4, format="int8")
    with pytest.raises(ValueError, match="device_map names cuda"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MetalMarlinConfig(), device_map={"": "cuda:0"})
    with pytest.raises(ValueError, match=r"does not fit layer model\.layers\.0"):
        _open_misfit(tmp_path)
    config = fields(tmp_path)
    config["model_type"] = "unheard_of"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"no model_type 'unheard_of': update it, or run the model with .*MarlinPipeline"):
        from_pretrained(tmp_path)


def _open_misfit(folder):
    """Packed matrices of another shape than the model's."""
    quantize(tiny_model("llama"), bits=4).save_pretrained(folder / "packed")
    config = fields(folder / "packed")
    config["intermediate_size"] = 32
    (folder / "packed" / "config.json").write_text(json.dumps(config))
    from_pretrained(folder / "packed")


def test_other_versions_are_refused():
    with pytest.raises(ValueError, match="version 2; this release of metal_marlin reads 1"):
        MetalMarlinConfig(version=2)
    with pytest.raises(ValueError, match="contradicts"):
        MetalMarlinConfig(bits=4, format="int8")


def test_a_model_that_another_quantiser_has_is_refused():
    model = tiny_model("llama")

    class Other:
        quantization_config = type("Config", (), {"quant_method": "other"})

    model.hf_quantizer = Other()
    with pytest.raises(ValueError, match="quantised with other already"):
        replace_linear_layers(model, MetalQuantizedLinear, bits=4)


def test_importing_the_package_is_quick_and_registers_whatever_comes_first():
    code = """
import sys
{first}
assert "torch" not in sys.modules or {torch_is_first}
{second}
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
assert AUTO_QUANTIZER_MAPPING["metal-marlin"].__name__ == "MetalMarlinQuantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["metal-marlin"].__name__ == "MetalMarlinConfig"
"""
    ours, theirs = "import metal_marlin", "from transformers import AutoModelForCausalLM, PreTrainedModel"
    for first, second, torch_is_first in ((ours, theirs, False), (theirs, ours, True)):
        subprocess.run([sys.executable, "-c", code.format(first=first, second=second, torch_is_first=torch_is_first)], check=True)
