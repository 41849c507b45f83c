"""torch.ops.dsa_tvm: registration, compilation, export, gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import dsa_tvm  # noqa: E402
import dsa_tvm.torch_ops  # noqa: E402
from dsa_tvm.ops import OPS  # noqa: E402

OPERATORS = torch.ops.dsa_tvm
KWARGS = {
    "lightning_indexer": {},
    "topk": {"topk": 16},
    "indexer_topk": {"topk": 16},
    "sparse_mla": {"sm_scale": 0.04, "d_v": 512},
    "sparse_mla_fp8": {"sm_scale": 0.04, "d_v": 512},
    "dsa_attention": {"topk": 16, "sm_scale": 0.04, "d_v": 512},
    "write_rows": {},
}


def arguments(name, device, s_q=3, s_kv=200, dtype=torch.float32, key_dtype=None):
    torch.manual_seed(s_q)
    ks, ke = torch.zeros(s_q, dtype=torch.int32), torch.full((s_q,), s_kv, dtype=torch.int32)
    index = (torch.randn(s_q, 8, 64).to(dtype), torch.randn(s_kv, 64).to(key_dtype or dtype), torch.rand(s_q, 8))
    q, kv = torch.randn(s_q, 4, 576).to(dtype), torch.randn(s_kv, 576).to(dtype)
    indices = torch.randint(-1, s_kv, (s_q, 16), dtype=torch.int32)
    made = {
        "lightning_indexer": (*index, ks, ke),
        "topk": (torch.randn(s_q, s_kv), ks, ke),
        "indexer_topk": (*index, ks, ke, torch.rand(s_kv)),
        "sparse_mla": (q, kv, indices, torch.randn(4)),
        "sparse_mla_fp8": (q.bfloat16(), dsa_tvm.pack_mla_rows(kv), indices, torch.randn(4)),
        "dsa_attention": (*index, ks, ke, q, kv, torch.rand(s_kv), torch.randn(4)),
        "write_rows": (kv[None], q[None, :, 0].contiguous(), torch.randint(-2, s_kv, (1, s_q), dtype=torch.int32)),
    }[name]
    return tuple(x.to(device) for x in made)


def tensors(x):
    return x if isinstance(x, (tuple, list)) else (x,)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, device):
    torch.library.opcheck(getattr(OPERATORS, name).default, arguments(name, device), KWARGS[name])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_as_the_function(name, dtype, device):
    args = arguments(name, device, dtype=dtype, key_dtype=torch.float8_e4m3fn)
    plain = getattr(dsa_tvm, name)(*args, **KWARGS[name])
    assert equal(getattr(OPERATORS, name)(*args, **KWARGS[name]), plain)
    assert all(isinstance(x, torch.Tensor) for x in tensors(plain))


@pytest.mark.parametrize("name", ["lightning_indexer", "indexer_topk"])
def test_int8(name, device):
    """Integers are the same numbers as float32, and their products and sums exact in it: the same bits on a CPU."""
    q, k, *rest = arguments(name, device)
    q, k = ((x * 40).round().clamp(-128, 127).to(torch.int8) for x in (q, k))
    plain = getattr(dsa_tvm, name)(q, k, *rest, **KWARGS[name])
    assert equal(getattr(OPERATORS, name)(q, k, *rest, **KWARGS[name]), plain)
    if device == "cpu":
        assert equal(getattr(dsa_tvm, name)(q.float(), k.float(), *rest, **KWARGS[name]), plain)
    with pytest.raises(dsa_tvm.ArgumentError, match=f"{name}: k: expected int8, got "):
        getattr(OPERATORS, name)(q, k.view(torch.uint8), *rest, **KWARGS[name])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32])
def test_quantized_tensors_are_refused(dtype):
    q, *rest = arguments("lightning_indexer", "cpu")
    with pytest.raises(dsa_tvm.ArgumentError, match=r"q: expected float32 or .* got DLPack type"):
        dsa_tvm.lightning_indexer(torch.quantize_per_tensor(q, 0.1, 0, dtype), *rest)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in OPS), ("lightning_indexer", torch.int8)]
)
def test_fake_outputs_are_like_real_ones(name, dtype, device):
    args = arguments(name, device, dtype=dtype)
    real = tensors(getattr(OPERATORS, name)(*args, **KWARGS[name]))
    meta = tensors(getattr(OPERATORS, name)(*(a.to("meta") for a in args), **KWARGS[name]))
    assert [(x.shape, x.dtype, x.stride()) for x in real] == [(x.shape, x.dtype, x.stride()) for x in meta]


class Wrapper(torch.nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, *args):
        return getattr(OPERATORS, self.name)(*args, **KWARGS[self.name])


@pytest.mark.parametrize("name", OPS)
def test_compile(name, device):
    compiled = torch.compile(Wrapper(name), fullgraph=True, dynamic=True, backend="aot_eager")
    for s_q, s_kv in ((3, 200), (5, 301)):
        args = arguments(name, device, s_q, s_kv)
        assert equal(compiled(*args), Wrapper(name)(*args))


def test_compile_with_inductor(device):
    def step(*args):
        return torch.relu(OPERATORS.lightning_indexer(*args)) + 1

    args = arguments("lightning_indexer", device)
    assert equal(torch.compile(step, fullgraph=True)(*args), step(*args))


def test_export(device):
    args = arguments("dsa_attention", device)
    s_q, s_kv = torch.export.Dim("s_q"), torch.export.Dim("s_kv")
    lengths = [s_q, s_kv, s_q, s_q, s_q, s_q, s_kv, s_kv, None]
    shapes = ([{0: n} if n else None for n in lengths],)
    exported = torch.export.export(Wrapper("dsa_attention"), args, dynamic_shapes={"args": tuple(*shapes)})
    for s_q, s_kv in ((3, 200), (5, 301)):
        args = arguments("dsa_attention", device, s_q, s_kv)
        assert equal(exported.module()(*args), Wrapper("dsa_attention")(*args))


@pytest.mark.parametrize("name", ["lightning_indexer", "sparse_mla", "dsa_attention"])
def test_gradients_are_refused(name, device):
    first, *rest = arguments(name, device)
    first.requires_grad_()
    out = tensors(getattr(OPERATORS, name)(first, *rest, **KWARGS[name]))[0]
    with pytest.raises(NotImplementedError, match=rf"dsa_tvm\.{name} has no backward"):
        out.nan_to_num(neginf=0).sum().backward()
    with pytest.raises(dsa_tvm.ArgumentError, match="requires_grad"):
        getattr(dsa_tvm, name)(first, *rest, **KWARGS[name])
    with torch.no_grad():
        getattr(dsa_tvm, name)(first, *rest, **KWARGS[name])


class Subclass(torch.Tensor):
    """Of a module that is not torch's."""


def test_subclasses_are_torch_tensors(device):
    q, kv, indices, _ = arguments("sparse_mla", device, dtype=torch.bfloat16)
    expected = dsa_tvm.sparse_mla(q, kv, indices)
    found = dsa_tvm.sparse_mla(*(x.as_subclass(Subclass) for x in (q, kv, indices)))
    assert all(isinstance(x, torch.Tensor) and torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_a_backward_sees_that_an_output_was_written_to(device):
    logits, ks, ke = arguments("topk", device)
    q, k, weights, *_ = arguments("lightning_indexer", device)
    out, w = torch.zeros_like(logits), torch.ones((), device=device, requires_grad=True)
    product = (w * out).sum()
    with torch.no_grad():
        dsa_tvm.lightning_indexer(q, k, weights, ks, ke, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        dsa_tvm.lightning_indexer(q, k, weights, ks, ke, out=torch.empty_like(logits))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int7"])
def test_types_of_fewer_bits_than_their_storage_are_refused(dtype):
    if not hasattr(torch, dtype):
        pytest.skip(f"torch has no {dtype}")
    x = torch.zeros(1, 2, 32, dtype=torch.uint8).view(getattr(torch, dtype))
    with pytest.raises(dsa_tvm.ArgumentError, match="lightning_indexer: q: expected"):
        dsa_tvm.lightning_indexer(x, x[0], *arguments("lightning_indexer", "cpu", 1, 2)[2:])


def test_inference_mode(device):
    with torch.inference_mode():
        assert OPERATORS.topk(*arguments("topk", device), topk=3).shape == (3, 3)


def test_errors_keep_their_words(device):
    logits, ks, ke = arguments("topk", device)
    with pytest.raises(dsa_tvm.ArgumentError, match="topk: logits: expected a contiguous tensor"):
        OPERATORS.topk(logits.T.contiguous().T, ks, ke, topk=3)
    with pytest.raises(dsa_tvm.ArgumentError, match="topk: ke: expected int32, got "):
        OPERATORS.topk(logits, ks, ke.long(), topk=3)
