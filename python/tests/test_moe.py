import copy
import pickle

import pytest
import torch
from tiny_models import MOE, relative_error, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, NemotronHConfig

from metal_marlin import MetalQuantizedMoE, find_moe_layers, quantize_moe_experts
from metal_marlin.moe import ExpertsLayout

pytestmark = pytest.mark.usefixtures("no_grad")

# Modules of Transformers, and where Mixtral's tiny model has one.
LAYER = "model.layers.1.mlp.experts"


def routed(experts, tokens=7, dtype=torch.float32):
    torch.manual_seed(3)
    layout = ExpertsLayout.of(experts)
    index = torch.stack([torch.randperm(layout.experts)[:2] for _ in range(tokens)])
    return torch.randn(tokens, layout.hidden, dtype=dtype), index, torch.rand(tokens, 2)


@pytest.mark.parametrize("format", ["fp4", "int4", "int8", "mxfp4", "int3"])
@pytest.mark.parametrize("family", MOE)
def test_experts_compute_what_transformers_does_with_their_weights(family, format):
    experts = tiny_model(family).get_submodule(LAYER)
    quantized = MetalQuantizedMoE.from_experts(experts, format=format, activations="f32")
    reference = copy.deepcopy(experts)
    reference.load_state_dict(quantized.dequantize())
    x, index, weights = routed(experts)
    assert relative_error(quantized(x, index, weights), reference(x, index, weights)) < 1e-5


@pytest.mark.parametrize(
    ("family", "activation", "transposed", "interleaved", "has_bias"),
    [
        ("qwen3_moe", "silu", False, False, False),
        ("mixtral", "silu", False, False, False),
        ("glm4_moe_lite", "silu", False, False, False),
        ("gpt_oss", "clamped_swiglu", True, True, True),
    ],
)
def test_layouts_are_found_out(family, activation, transposed, interleaved, has_bias):
    layout = ExpertsLayout.of(tiny_model(family).get_submodule(LAYER))
    found = (layout.activation, layout.transposed, layout.interleaved, layout.has_bias)
    assert found == (activation, transposed, interleaved, has_bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    experts = tiny_model("mixtral").get_submodule(LAYER).to(dtype)
    quantized = MetalQuantizedMoE.from_experts(experts, bits=8)
    x, index, weights = routed(experts, dtype=dtype)
    y = quantized(x, index, weights.to(dtype))
    assert y.dtype is dtype
    assert relative_error(y, experts(x, index, weights.to(dtype))) < 0.03


def test_many_tokens_of_half_precision_are_those_of_single_precision():
    # As many as are widened in two steps.
    experts = tiny_model("mixtral").get_submodule(LAYER)
    quantized = MetalQuantizedMoE.from_experts(experts, bits=8)
    x, index, weights = routed(experts, tokens=70_000)
    x = x.bfloat16()
    assert torch.equal(quantized(x, index, weights), quantized(x.float(), index, weights).bfloat16())


def test_an_index_of_no_expert_counts_for_nothing():
    experts = tiny_model("mixtral").get_submodule(LAYER)
    quantized = MetalQuantizedMoE.from_experts(experts, activations="f32")
    x, index, weights = routed(experts)
    index[2, 1] = index[4, 0] = index[5, :] = quantized.num_experts
    reference = copy.deepcopy(experts)
    reference.load_state_dict(quantized.dequantize())
    none = index == quantized.num_experts
    wanted = reference(x, index.masked_fill(none, 0), weights.masked_fill(none, 0.0))
    found = quantized(x, index, weights)
    assert relative_error(found, wanted) < 1e-5
    assert not found[5].any()
    with pytest.raises(ValueError, match="-1"):
        quantized(x, torch.full_like(index, -1), weights)


def test_empty_batches():
    experts = tiny_model("qwen3_moe").get_submodule(LAYER)
    x, index, weights = routed(experts)
    assert MetalQuantizedMoE.from_experts(experts)(x[:0], index[:0], weights[:0]).shape == (0, 64)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_copies_are_the_same_to_the_bit(family):
    experts = tiny_model(family).get_submodule(LAYER)
    quantized = MetalQuantizedMoE.from_experts(experts, format="fp4")
    x, index, weights = routed(experts)
    loaded = MetalQuantizedMoE(quantized.layout, format="fp4")
    loaded.load_state_dict(quantized.state_dict())
    for other in (loaded, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(x, index, weights), quantized(x, index, weights))
        pairs = zip(other.state_dict().items(), quantized.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(left, right) for (a, left), (b, right) in pairs)
        assert repr(other) == repr(quantized)


def test_state_dict_has_every_matrix_by_itself():
    quantized = MetalQuantizedMoE.from_experts(tiny_model("mixtral").get_submodule(LAYER), format="fp4", group_size=32)
    state = quantized.state_dict()
    parts = ("gate_proj", "up_proj", "down_proj")
    names = {f"{e}.{part}.weight{s}" for e in range(4) for part in parts for s in ("", "_scale")}
    assert state.keys() == names
    assert (state["3.down_proj.weight"].shape, state["3.down_proj.weight"].dtype) == ((64, 48), torch.uint8)


def test_weights_are_held_once():
    quantized = MetalQuantizedMoE.from_experts(tiny_model("gpt_oss").get_submodule(LAYER), format="int8")
    assert [name for name, _ in quantized.named_parameters()] == ["gate_up_proj_bias", "down_proj_bias"]
    packed = sum(matrix.nbytes for expert in quantized.matrices for matrix in expert)
    assert quantized.nbytes <= 1.5 * packed


def test_find_moe_layers():
    assert list(find_moe_layers(tiny_model("mixtral"))) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert list(find_moe_layers(tiny_model("glm4_moe_lite"))) == ["model.layers.1.mlp.experts"]
    assert find_moe_layers(tiny_model("llama")) == {}
    model = quantize_moe_experts(tiny_model("mixtral"))
    assert all(isinstance(module, MetalQuantizedMoE) for module in find_moe_layers(model).values())
    assert len(find_moe_layers(model)) == 2


def test_quantize_moe_experts_takes_experts_or_what_holds_them():
    model = tiny_model("mixtral")
    block = model.model.layers[0].mlp
    lone = quantize_moe_experts(block.experts, bits=8)
    assert isinstance(lone, MetalQuantizedMoE)
    assert not isinstance(block.experts, MetalQuantizedMoE)
    assert quantize_moe_experts(block, bits=8) is block
    assert isinstance(block.experts, MetalQuantizedMoE)
    assert not isinstance(model.model.layers[1].mlp.experts, MetalQuantizedMoE)


def test_what_cannot_be_quantised():
    with pytest.raises(ValueError, match="Linear has no experts: find_moe_layers"):
        quantize_moe_experts(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="LayerNorm holds no experts"):
        MetalQuantizedMoE.from_experts(nn.LayerNorm(2))
    experts = tiny_model("mixtral").get_submodule(LAYER)
    with pytest.raises(TypeError, match="quantised already"):
        MetalQuantizedMoE.from_experts(MetalQuantizedMoE.from_experts(experts))
    with pytest.raises(ValueError, match="contradicts"):
        MetalQuantizedMoE.from_experts(experts, bits=4, format="int8")
    with pytest.raises(ValueError, match="meta tensor"):
        MetalQuantizedMoE.from_experts(copy.deepcopy(experts).to("meta"))
    experts.act_fn = nn.Tanh()
    with pytest.raises(TypeError, match=r"activation that is not supported \(supported are silu, gelu_tanh, clamped_swiglu\)"):
        MetalQuantizedMoE.from_experts(experts)


def test_experts_without_a_gate_are_refused():
    config = NemotronHConfig(
        vocab_size=32, hidden_size=16, layers_block_type=["moe"], n_routed_experts=4, moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    (experts,) = find_moe_layers(AutoModelForCausalLM.from_config(config)).values()
    with pytest.raises(TypeError, match="no gate"):
        MetalQuantizedMoE.from_experts(experts)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 100), r"cannot be multiplied \(2x100 and 64x96\)"),
        (torch.zeros(2, 64, dtype=torch.float64), r"torch.float64: convert it"),
        (torch.zeros(2, 64, device="meta"), "meta tensor"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    quantized = MetalQuantizedMoE.from_experts(tiny_model("mixtral").get_submodule(LAYER))
    with pytest.raises(RuntimeError, match=message):
        quantized(x, torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2))


def test_experts_without_weights_say_so():
    layout = ExpertsLayout.of(tiny_model("mixtral").get_submodule(LAYER))
    with pytest.raises(RuntimeError, match="no weights yet"):
        MetalQuantizedMoE(layout)(torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))


def test_state_dicts_that_do_not_fit():
    quantized = MetalQuantizedMoE.from_experts(tiny_model("mixtral").get_submodule(LAYER))
    state = quantized.state_dict()
    del state["2.up_proj.weight_scale"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"2.up_proj.weight_scale"'):
        quantized.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"9.up_proj.weight"'):
        quantized.load_state_dict({**quantized.state_dict(), "9.up_proj.weight": torch.zeros(1)})
