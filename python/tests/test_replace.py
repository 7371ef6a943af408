import copy
import pickle

import pytest
import torch
from tiny_models import (
    CONFIGS,
    MOE,
    assert_same_tokens,
    dequantized_like,
    relative_error,
    tiny_model,
    token_ids,
    trained_model_folder,
)
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from metal_marlin import MetalQuantizedLinear, MetalQuantizedMoE, find_moe_layers, replace_linear_layers, replace_moe_layers
from metal_marlin._native import Scheme

pytestmark = pytest.mark.usefixtures("no_grad")


def quantized_copy(model, **options):
    """The model with all that can be packed packed."""
    model = replace_linear_layers(copy.deepcopy(model), MetalQuantizedLinear, **options)
    return replace_moe_layers(model, MetalQuantizedMoE, **options) if find_moe_layers(model) else model


@pytest.mark.parametrize("format", ["fp4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_logits_are_those_of_the_dequantized_weights(family, format):
    original = tiny_model(family)
    quantized = quantized_copy(original, format=format, activations="f32")
    ids = token_ids(original)
    assert relative_error(quantized(ids).logits, dequantized_like(quantized, original)(ids).logits) < 2e-3
    assert relative_error(quantized(ids).logits, original(ids).logits) > 2e-3


@pytest.mark.parametrize("family", CONFIGS)
def test_rounded_activations_change_little(family):
    original = tiny_model(family)
    quantized = quantized_copy(original, bits=8)
    ids = token_ids(original)
    assert relative_error(quantized(ids).logits, dequantized_like(quantized, original)(ids).logits) < 0.1


@pytest.mark.parametrize("family", CONFIGS)
def test_generate_batched_with_padding_and_cache(family):
    original = tiny_model(family)
    quantized = quantized_copy(original, format="fp4", activations="f32")
    ids = token_ids(original)
    mask = torch.ones_like(ids)
    ids[1, :5], mask[1, :5] = 0, 0
    assert_same_tokens(quantized, dequantized_like(quantized, original), input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-glm4-moe"])
def test_trained_models(name):
    folder = trained_model_folder(name)
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    quantized = quantized_copy(original, format="fp4", search="absmax", activations="f32")
    reference = dequantized_like(quantized, original)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    inputs = tokenizer(
        ["Once upon a time there was a little", "The old man looked at the sea and"], return_tensors="pt", padding=True
    )
    assert relative_error(quantized(**inputs).logits, reference(**inputs).logits) < 2e-3
    assert_same_tokens(quantized, reference, **inputs)


def test_which_layers_are_replaced():
    model = replace_linear_layers(tiny_model("mixtral"), MetalQuantizedLinear, bits=4)
    replaced = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, MetalQuantizedLinear)}
    assert replaced == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert type(model.lm_head) is nn.Linear
    assert not any(isinstance(module, MetalQuantizedMoE) for module in model.modules())


def test_latent_attention_is_replaced():
    model = replace_linear_layers(tiny_model("glm4_moe_lite"), MetalQuantizedLinear, bits=4)
    attention = model.model.layers[0].self_attn
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert all(isinstance(getattr(attention, name), MetalQuantizedLinear) for name in names)


def test_skip_takes_names_ends_and_globs():
    skip = ["lm_head", "k_proj", "layers.0.mlp.*", "model.layers.1.self_attn.q_proj"]
    model = replace_linear_layers(tiny_model("llama"), MetalQuantizedLinear, bits=4, skip=skip)
    kept = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert kept == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "lm_head",
    ]
    moe = replace_moe_layers(tiny_model("mixtral"), bits=4, skip=["layers.0.*"])
    assert [isinstance(module, MetalQuantizedMoE) for module in find_moe_layers(moe).values()] == [False, True]


def test_a_tied_head_becomes_a_layer_by_itself():
    original = tiny_model("qwen3")
    embedding = original.get_input_embeddings().weight.clone()
    kept = replace_linear_layers(copy.deepcopy(original), MetalQuantizedLinear, bits=8)
    assert kept.lm_head.weight is kept.get_input_embeddings().weight
    assert kept.config.tie_word_embeddings
    model = replace_linear_layers(original, MetalQuantizedLinear, bits=8, skip=())
    assert isinstance(model.lm_head, MetalQuantizedLinear)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not model.config.tie_word_embeddings
    model.tie_weights()
    assert isinstance(model.lm_head, MetalQuantizedLinear)


def test_modules_with_two_names_are_quantised_once():
    shared = nn.Linear(32, 32)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(32, 32)})
    replace_linear_layers(model, MetalQuantizedLinear, bits=8)
    assert model["a"] is model["b"]
    assert model["a"] is not model["c"]


def test_any_module_will_do():
    model = replace_linear_layers(
        nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), MetalQuantizedLinear, bits=4, group_size=32
    )
    assert model[0].scheme == Scheme.of("fp4", 32)
    assert model(torch.randn(3, 32)).shape == (3, 8)
    assert isinstance(replace_linear_layers(nn.Linear(32, 8), MetalQuantizedLinear, bits=4), MetalQuantizedLinear)


def test_layer_class_is_what_is_put_in():
    class Counted(MetalQuantizedLinear):
        pass

    model = replace_linear_layers(nn.Sequential(nn.Linear(32, 8)), Counted, bits=4)
    assert type(model[0]) is Counted


def test_parameters_are_frozen_and_weights_held_once():
    model = quantized_copy(tiny_model("qwen3_moe"), bits=4)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    names = {name for name, _ in model.named_parameters()}
    assert not any("_proj" in name for name in names)
    with torch.enable_grad():
        assert not model(token_ids(model)).logits.requires_grad


def test_pickle_and_deepcopy_of_a_model():
    model = quantized_copy(tiny_model("gpt_oss"), bits=4)
    ids = token_ids(model)
    wanted = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, wanted)


def test_state_dict_of_a_model_round_trips():
    original = tiny_model("mixtral")
    model = quantized_copy(original, bits=4)
    torch.manual_seed(7)
    other = AutoModelForCausalLM.from_config(original.config).requires_grad_(False).eval()
    other = quantized_copy(other, bits=4)
    ids = token_ids(model)
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits)


def test_models_with_nothing_to_quantise():
    with pytest.raises(ValueError, match="Sequential has no linear layer to quantise"):
        replace_linear_layers(nn.Sequential(nn.LayerNorm(4)), MetalQuantizedLinear, bits=4)
    with pytest.raises(ValueError, match=r"every linear layer of Sequential is skipped, for example 0: pass another skip"):
        replace_linear_layers(nn.Sequential(nn.Linear(4, 4)), MetalQuantizedLinear, bits=4, skip=["0"])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer of experts"):
        replace_moe_layers(tiny_model("llama"))
    model = quantized_copy(tiny_model("mixtral"), bits=4)
    with pytest.raises(ValueError, match="linear layer of MixtralForCausalLM is quantised already"):
        replace_linear_layers(model, MetalQuantizedLinear, bits=8)
    with pytest.raises(ValueError, match="layer of experts of MixtralForCausalLM is quantised already"):
        replace_moe_layers(model, bits=8)


def test_a_layer_that_cannot_be_quantised_is_named():
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(20, 8))
    model[1].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"layer 1 cannot be quantised: .*finite"):
        replace_linear_layers(model, MetalQuantizedLinear, format="nvfp4")


@pytest.mark.parametrize("family", MOE)
def test_routers_stay(family):
    model = quantized_copy(tiny_model(family), bits=4)
    block = model.model.layers[1].mlp
    router = block.router if family == "gpt_oss" else block.gate
    assert router.weight.dtype is torch.float32
