"""Folders that the program writes in Transformers, and those of Transformers in the program."""

import pytest
import torch
from tiny_models import dequantized_like, relative_error, trained_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from metal_marlin import (
    MarlinPipeline,
    MetalQuantizedEmbedding,
    MetalQuantizedLinear,
    MetalQuantizedMoE,
    from_pretrained,
    quantize,
)

PROMPT = "Once upon a time there was a little girl who"


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def prompt_ids(folder):
    return AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids


def greedy_text(folder, model):
    """What a model of Transformers continues the prompt with."""
    ids = prompt_ids(folder)
    tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    return AutoTokenizer.from_pretrained(folder).decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-glm4-moe"])
def test_transformers_opens_what_the_program_quantised(name, tmp_path):
    source = trained_model_folder(name)
    report = quantize(source, tmp_path / "packed", format="fp4", method="mse")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    ours = from_pretrained(tmp_path / "packed", dtype=torch.float32, activations="f32")
    # The embedding and the head are packed, too.
    assert isinstance(model.get_input_embeddings(), MetalQuantizedEmbedding)
    assert isinstance(model.lm_head, MetalQuantizedLinear)
    packed = [module for module in model.modules() if isinstance(module, MetalQuantizedLinear | MetalQuantizedMoE)]
    matrices = sum(3 * module.num_experts if isinstance(module, MetalQuantizedMoE) else 1 for module in packed)
    tied = int(model.config.tie_word_embeddings)
    assert matrices + 1 - tied == len(report["matrices"])

    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    reference = dequantized_like(ours, original)
    embedding = ours.get_input_embeddings().dequantize(torch.float32)
    reference.get_input_embeddings().weight = torch.nn.Parameter(embedding, requires_grad=False)
    ids = prompt_ids(source)
    assert relative_error(ours(ids).logits, reference(ids).logits) < 2e-3
    assert relative_error(model(ids).logits, reference(ids).logits) < 0.1


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-glm4-moe"])
def test_the_program_opens_what_transformers_saved(name, tmp_path):
    source = trained_model_folder(name)
    model = from_pretrained(source, format="int8", dtype=torch.float32, activations="f32")
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    with MarlinPipeline.from_pretrained(tmp_path, device="cpu", exact=True) as pipe:
        assert str(pipe(PROMPT, max_tokens=16, temperature=0.0)) == greedy_text(source, model)


@pytest.mark.parametrize(("layout", "format"), [("gptq", "int4"), ("compressed-tensors", "int4"), ("gguf", "int4-sym")])
def test_other_layouts_stay_packed_as_they_are(layout, format, tmp_path):
    source = trained_model_folder("tiny-qwen3")
    path = tmp_path / ("packed.gguf" if layout == "gguf" else "packed")
    quantize(source, path, format=format, layout=layout, method="mse")
    model = from_pretrained(path, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    linears = [module for name, module in model.named_modules() if ".layers." in f".{name}" and name.endswith("_proj")]
    assert len(linears) == 56
    assert all(isinstance(module, MetalQuantizedLinear) for module in linears)
    assert len({module.scheme for module in linears}) == 1
    ids = prompt_ids(source)
    assert 0.01 < relative_error(model(ids).logits, original(ids).logits) < 0.2
