import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import relative_error
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from metal_marlin import MetalQuantizedEmbedding, MetalQuantizedLinear
from metal_marlin._native import Matrix, Scheme
from metal_marlin.schemes import FORMATS, USUAL_FORMATS, resolve_scheme

pytestmark = pytest.mark.usefixtures("no_grad")


def linear(in_features=256, out_features=48, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias, dtype=dtype)


def exact(layer, x):
    """What the layer must compute, from the weights that it says it has."""
    bias = None if layer.bias is None else layer.bias.double()
    return nn.functional.linear(x.double(), layer.dequantize(torch.float64), bias)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_computes_with_its_dequantized_weights(format):
    layer = MetalQuantizedLinear.from_linear(linear(), format=format, activations="f32")
    x = torch.randn(5, 256)
    assert relative_error(layer(x), exact(layer, x)) < 1e-5


@pytest.mark.parametrize(("bits", "bound"), [(2, 0.6), (3, 0.3), (4, 0.15), (8, 0.01)])
def test_bits_pick_a_format_that_is_as_near(bits, bound):
    source = linear()
    layer = MetalQuantizedLinear.from_linear(source, bits=bits)
    assert layer.scheme == Scheme.of(USUAL_FORMATS[bits])
    error = relative_error(layer.dequantize(), source.weight)
    assert bound / 4 < error < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activations", ["int8", "f32"])
def test_dtypes(dtype, activations):
    layer = MetalQuantizedLinear.from_linear(linear(dtype=dtype), activations=activations)
    x = torch.randn(3, 256).to(dtype)
    y = layer(x)
    assert y.dtype is dtype
    assert relative_error(y, exact(layer, x)) < (0.02 if activations == "int8" else {2: 4e-3, 4: 1e-5}[dtype.itemsize])


def test_input_and_bias_of_other_dtypes_than_the_layer():
    layer = MetalQuantizedLinear.from_linear(linear(), activations="f32")
    assert layer.bias.dtype is torch.float32
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.randn(2, 256).to(dtype)
        assert layer(x).dtype is dtype
        assert relative_error(layer(x), exact(layer, x)) < 1e-2
    assert torch.equal(layer.to(torch.bfloat16).bias, layer.bias.to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256), (2, 2, 2, 256), (0, 256), (3, 0, 256)])
def test_leading_dimensions(shape):
    layer = MetalQuantizedLinear.from_linear(linear(), activations="f32")
    x = torch.randn(shape)
    y = layer(x)
    assert y.shape == (*shape[:-1], 48)
    assert torch.allclose(y.double(), exact(layer, x), atol=1e-5)


def test_inputs_that_are_not_contiguous():
    layer = MetalQuantizedLinear.from_linear(linear())
    x = torch.randn(256, 6).T
    assert not x.is_contiguous()
    assert torch.equal(layer(x), layer(x.contiguous()))
    strided = torch.randn(6, 512)[:, ::2]
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_the_last_group_may_be_short_where_the_format_allows():
    for in_features in (64, 130, 200):
        layer = MetalQuantizedLinear.from_linear(linear(in_features), format="fp4", group_size=128, activations="f32")
        x = torch.randn(2, in_features)
        assert relative_error(layer(x), exact(layer, x)) < 1e-5


def test_state_dict_has_the_names_and_bytes_of_a_checkpoint():
    source = linear()
    layer = MetalQuantizedLinear.from_linear(source, format="fp4")
    state = layer.state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "weight": (torch.uint8, (48, 128)),
        "weight_scale": (torch.float16, (48, 2)),
        "bias": (torch.float32, (48,)),
    }
    tensors = Matrix.encode(source.weight.numpy(), Scheme.of("fp4")).tensors()
    assert state["weight"].reshape(-1).tolist() == tensors[""].tolist()
    assert state["weight_scale"].reshape(-1).view(torch.uint8).tolist() == tensors["_scale"].tolist()


@pytest.mark.parametrize("format", FORMATS)
def test_copies_are_the_same_to_the_bit(format):
    layer = MetalQuantizedLinear.from_linear(linear(), format=format)
    x = torch.randn(4, 256)
    loaded = MetalQuantizedLinear(256, 48, format=format)
    loaded.load_state_dict(layer.state_dict())
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    copies = [
        loaded,
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(stored, weights_only=False),
        MetalQuantizedLinear.from_packed(
            {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"},
            layer.scheme,
            256,
            bias=layer.bias,
        ),
        MetalQuantizedLinear.from_packed(layer.matrix, bias=layer.bias),
    ]
    for other in copies:
        assert torch.equal(other(x), layer(x))
        assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), layer.state_dict().values(), strict=True))
        assert repr(other) == repr(layer)


def test_copies_share_weights_which_never_change():
    layer = MetalQuantizedLinear.from_linear(linear())
    other = copy.deepcopy(layer)
    before = layer(torch.ones(1, 256))
    torch.manual_seed(9)
    other.load_state_dict(MetalQuantizedLinear.from_linear(nn.Linear(256, 48)).state_dict())
    assert torch.equal(layer(torch.ones(1, 256)), before)
    assert not torch.equal(other(torch.ones(1, 256)), before)


def test_weights_are_held_once():
    layer = MetalQuantizedLinear.from_linear(linear(1024, 512), format="fp4")
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not list(layer.buffers())
    assert layer.nbytes <= 1.05 * layer.matrix.nbytes


def test_weight_tells_what_code_asks_a_linear_layer_and_dequantizes_on_use():
    layer = MetalQuantizedLinear.from_linear(linear(dtype=torch.bfloat16))
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.device.type) == ((48, 256), torch.bfloat16, "cpu")
    x = torch.randn(2, 256, dtype=torch.bfloat16)
    assert torch.equal(nn.functional.linear(x, layer.weight), nn.functional.linear(x, layer.dequantize()))
    assert torch.equal(layer.weight + 0, layer.dequantize(torch.bfloat16))
    assert "dequantised when it is used" in repr(layer.weight)


def test_to_linear_gives_back_a_layer_of_torch():
    layer = MetalQuantizedLinear.from_linear(linear(), activations="f32")
    x = torch.randn(2, 256)
    back = layer.to_linear()
    assert type(back) is nn.Linear
    assert relative_error(layer(x), back(x)) < 1e-5


def test_repr():
    layer = MetalQuantizedLinear.from_linear(linear(bias=False), format="fp4", group_size=64)
    assert repr(layer) == (
        f"MetalQuantizedLinear(in_features=256, out_features=48, bias=False, "
        f"format={str(Scheme.of('fp4', 64))!r}, bits_per_weight=4.25)"
    )


def test_to_cpu_and_eval_and_train_are_harmless():
    layer = MetalQuantizedLinear.from_linear(linear())
    x = torch.randn(2, 256)
    before = layer(x)
    assert torch.equal(layer.cpu().eval().train().to("cpu")(x), before)


def test_two_threads_may_call_one_layer():
    layer = MetalQuantizedLinear.from_linear(linear(512, 256))
    inputs = [torch.randn(1 + i % 5, 512) for i in range(40)]
    wanted = [layer(x) for x in inputs]

    def call(x):
        with torch.no_grad():
            return layer(x)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(call, inputs))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_row_does_not_depend_on_its_batch():
    layer = MetalQuantizedLinear.from_linear(linear())
    x = torch.randn(17, 256)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_wide_rows_of_half_precision_are_those_of_single_precision(dtype):
    # As many as are widened in several steps, the last of them shorter.
    layer = MetalQuantizedLinear.from_linear(linear(32, 60_000, bias=False, dtype=dtype), group_size=32)
    x = torch.randn(300, 32).to(dtype)
    assert torch.equal(layer(x), layer(x.float()).to(dtype))


def test_gradients_are_refused():
    layer = MetalQuantizedLinear.from_linear(linear())
    x = torch.randn(2, 256, requires_grad=True)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"compute no gradients: .*torch\.no_grad"):
        layer(x)
    assert layer(x).shape == (2, 48)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_inference_mode():
    layer = MetalQuantizedLinear.from_linear(linear())
    x = torch.randn(2, 256)
    wanted = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), wanted)
        assert torch.equal(layer(x.clone()), wanted)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 100), r"mat1 and mat2 shapes cannot be multiplied \(6x100 and 256x48\).*in_features=256"),
        (torch.zeros(()), r"cannot be multiplied .*in_features=256"),
        (torch.zeros(2, 256, dtype=torch.float64), r"float32, float16 or bfloat16, but got torch.float64: convert it"),
        (torch.zeros(2, 256, dtype=torch.int64), r"but got torch.int64: convert it"),
        (torch.zeros(2, 256, device="meta"), r"the input is a meta tensor"),
    ],
)
def test_inputs_that_do_not_fit(x, message):
    with pytest.raises(RuntimeError, match=message):
        MetalQuantizedLinear.from_linear(linear())(x)


def test_inputs_on_another_device():
    layer = MetalQuantizedLinear.from_linear(linear())
    with FakeTensorMode():
        x = torch.empty(2, 256, device="cuda")
    with pytest.raises(
        RuntimeError, match=r"same device, but the input is on cuda:0 and the quantised weights are on cpu: keep the model"
    ):
        layer(x)


def test_a_layer_without_weights_says_so():
    with pytest.raises(RuntimeError, match=r"no weights yet: load_state_dict\(\) fills it"):
        MetalQuantizedLinear(256, 48)(torch.zeros(1, 256))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4, "format": "int8"}, r"bits=4 contradicts format='int8'.*fp4, int4"),
        ({"bits": 5}, r"no format of 5 bits; bits can be 2 \(int2\)"),
        ({"bits": 7, "format": "fp4"}, r"contradicts.*no format has so many"),
        ({"format": "int5"}, r"int5"),
        ({"format": "mxfp4", "group_size": 64}, r"32"),
        ({"format": "fp4", "group_size": 0}, r"group_size must be positive"),
        ({"bits": 4, "scheme": Scheme.of("int8")}, r"scheme \(int8 .*leave these out, or scheme"),
    ],
)
def test_formats_that_there_are_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_scheme(**arguments)


def test_agreeing_bits_and_format():
    assert resolve_scheme(4, "fp4") == resolve_scheme(4) == resolve_scheme() == Scheme.of("fp4", 128)
    assert resolve_scheme(8, group_size=32) == Scheme.of("int8", 32)


def test_what_cannot_be_quantised():
    layer = MetalQuantizedLinear.from_linear(linear())
    with pytest.raises(TypeError, match="quantised already"):
        MetalQuantizedLinear.from_linear(layer)
    with pytest.raises(TypeError, match=r"expected a torch\.nn.Linear, found LayerNorm"):
        MetalQuantizedLinear.from_linear(nn.LayerNorm(4))
    with pytest.raises(ValueError, match=r"meta tensor.*load the model first"):
        MetalQuantizedLinear.from_linear(nn.Linear(256, 4, device="meta"))
    with pytest.raises(ValueError, match="activations must be one of 'int8', 'f32', found 'int4'"):
        MetalQuantizedLinear.from_linear(linear(), activations="int4")
    source = linear()
    source.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        MetalQuantizedLinear.from_linear(source)


def test_state_dicts_that_do_not_fit():
    layer = MetalQuantizedLinear(256, 48, format="fp4")
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_scale"(.|\n)*unquantised model'):
        layer.load_state_dict(linear().state_dict())
    other = MetalQuantizedLinear.from_linear(linear(), format="fp4", group_size=64)
    with pytest.raises(
        RuntimeError, match=r"weight_scale .*must be torch.float16 of shape \[48, 2\], found .*\[48, 4\].*another format"
    ):
        layer.load_state_dict(other.state_dict())
    state = MetalQuantizedLinear.from_linear(linear(), format="fp4").state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"weight_zero"'):
        layer.load_state_dict({**state, "weight_zero": torch.zeros(1)})


def test_packed_weights_that_do_not_fit():
    layer = MetalQuantizedLinear.from_linear(linear(), format="fp4")
    weight = {name: tensor for name, tensor in layer.state_dict().items() if name != "bias"}
    with pytest.raises(ValueError, match="pass scheme and in_features"):
        MetalQuantizedLinear.from_packed(weight)
    with pytest.raises(ValueError, match=r"weight of a matrix .* must be"):
        MetalQuantizedLinear.from_packed(weight, layer.scheme, 512)
    with pytest.raises(ValueError, match=r"bias must have the shape \[48\], found \[3\]"):
        MetalQuantizedLinear.from_packed(weight, layer.scheme, 256, bias=torch.zeros(3))
    with pytest.raises(ValueError, match="weight_scale, which is missing"):
        MetalQuantizedLinear.from_packed({"weight": weight["weight"]}, layer.scheme, 256)


@pytest.mark.parametrize("format", ["int8", "fp4", "int4", "nvfp4", "bf16"])
def test_embedding(format):
    torch.manual_seed(0)
    table = nn.Embedding(64, 96)
    matrix = Matrix.encode(table.weight.detach().numpy(), Scheme.of(format))
    embedding = MetalQuantizedEmbedding(64, 96, Scheme.of(format), dtype=torch.bfloat16)
    embedding.load_matrix(matrix)
    ids = torch.tensor([[5, 0, 63], [5, 5, 1]])
    assert torch.equal(embedding(ids), torch.from_numpy(matrix.dequantize()).bfloat16()[ids])
    assert embedding(ids[:0]).shape == (0, 3, 96)
    loaded = MetalQuantizedEmbedding(64, 96, Scheme.of(format), dtype=torch.bfloat16)
    loaded.load_state_dict(embedding.state_dict())
    for other in (loaded, copy.deepcopy(embedding), pickle.loads(pickle.dumps(embedding))):
        assert torch.equal(other(ids), embedding(ids))
    with pytest.raises(IndexError):
        embedding(torch.tensor([64]))
