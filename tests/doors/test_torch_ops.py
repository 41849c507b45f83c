"""torch.ops.dsa_tvm: registration, compilation, export, gradients."""

from __future__ import annotations

import importlib
import itertools

import pytest

torch = pytest.importorskip("torch")

from devices import as_tuple, needs_inductor  # noqa: E402
from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.autograd import forward_ad  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import dsa_tvm  # noqa: E402
import dsa_tvm.torch_ops  # noqa: E402
from dsa_tvm.ops import OPS  # noqa: E402
from dsa_tvm.runtime import frames  # noqa: E402

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
        "sparse_mla_fp8": (q.bfloat16(), dsa_tvm.pack_mla_rows(kv.float()), indices, torch.randn(4)),
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
    with pytest.raises(dsa_tvm.ArgumentError, match=rf"q: expected float32 or .* or int8, got {dtype}$"):
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


@needs_inductor
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


def dual_tensors(function, x):
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODE = {
    "dual": dual_tensors,
    "jvp": lambda function, x: torch.func.jvp(function, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda function, x: torch.func.jacfwd(function)(x),
    "linearize": torch.func.linearize,
}
REVERSE_MODE = {
    "grad": lambda function, x: torch.func.grad(lambda y: function(y).sum())(x),
    "vjp": torch.func.vjp,
    "jacrev": lambda function, x: torch.func.jacrev(function)(x),
    "hessian": lambda function, x: torch.func.hessian(lambda y: function(y).sum())(x),
    "functional": lambda function, x: torch.autograd.functional.jacobian(function, x),
}


@pytest.mark.parametrize("name", ["lightning_indexer", "sparse_mla", "dsa_attention"])
@pytest.mark.parametrize("derivative", [*FORWARD_MODE, *REVERSE_MODE])
def test_every_derivative_is_refused(name, derivative):
    """No derivative may silently be zero."""
    first, *rest = arguments(name, "cpu")
    take = (FORWARD_MODE | REVERSE_MODE)[derivative]

    def operator(x):
        return tensors(getattr(OPERATORS, name)(x, *rest, **KWARGS[name]))[0]

    def function(x):
        return tensors(getattr(dsa_tvm, name)(x, *rest, **KWARGS[name]))[0]

    word = "forward-mode derivative" if derivative in FORWARD_MODE else "backward"
    with pytest.raises(NotImplementedError, match=rf"dsa_tvm\.{name} has no {word}"):
        take(operator, first)
    with pytest.raises(dsa_tvm.ArgumentError, match=rf"{name}: {OPS[name].inputs[0].name}: expected .*, got "):
        take(function, first)


def test_any_argument_may_be_the_dual_one():
    q, kv, indices, sink = arguments("sparse_mla", "cpu")
    given = {"q": q, "kv": kv, "indices": indices, "attn_sink": sink}
    for name in ("q", "kv", "attn_sink"):
        with forward_ad.dual_level():
            dual = given | {name: forward_ad.make_dual(given[name], torch.ones_like(given[name]))}
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                OPERATORS.sparse_mla(**dual, **KWARGS["sparse_mla"])
            with pytest.raises(dsa_tvm.ArgumentError, match=f"sparse_mla: {name}: expected a tensor without a tangent"):
                dsa_tvm.sparse_mla(**dual, **KWARGS["sparse_mla"])
            primal = {n: forward_ad.unpack_dual(x).primal for n, x in dual.items()}
            assert equal(
                OPERATORS.sparse_mla(**primal, **KWARGS["sparse_mla"]),
                dsa_tvm.sparse_mla(**given, **KWARGS["sparse_mla"]),
            )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", OPS)
def test_vmap(name):
    """The operator is called for each element of the batch. The functions refuse vmap with a message."""
    first, second = arguments(name, "cpu"), arguments(name, "cpu")
    second = (second[0].flip(0), *second[1:])
    batch = [torch.stack([x, y]) for x, y in zip(first, second, strict=True)]
    found = tensors(torch.func.vmap(lambda *args: getattr(OPERATORS, name)(*args, **KWARGS[name]))(*batch))
    expected = [tensors(getattr(OPERATORS, name)(*args, **KWARGS[name])) for args in (first, second)]
    for x, *pair in zip(found, *expected, strict=True):
        assert torch.equal(x, torch.stack(pair))
    with pytest.raises(dsa_tvm.ArgumentError, match=rf"expected a plain tensor, got .*torch\.ops\.dsa_tvm\.{name}"):
        torch.func.vmap(lambda *args: getattr(dsa_tvm, name)(*args, **KWARGS[name]))(*batch)


@pytest.mark.parametrize("trace", ["make_fx", "before the dispatcher", "jit"])
def test_functions_are_not_traced(trace):
    """A trace would contain an empty output that nothing fills."""
    logits, ks, ke = arguments("topk", "cpu")
    traces = {
        "make_fx": lambda f: make_fx(f)(logits),
        "before the dispatcher": lambda f: make_fx(f, pre_dispatch=True)(logits),
        "jit": lambda f: torch.jit.trace(f, logits),
    }
    with pytest.raises(dsa_tvm.ArgumentError, match=r"topk: logits: expected .* trace.*torch\.ops\.dsa_tvm\.topk"):
        traces[trace](lambda x: dsa_tvm.topk(x, ks, ke, 3))
    traced = traces[trace](lambda x: OPERATORS.topk(x, ks, ke, topk=3))
    other = logits.flip(1).contiguous()
    assert torch.equal(traced(other), dsa_tvm.topk(other, ks, ke, 3))


class Seen(TorchDispatchMode):
    """Records the operators that torch dispatches."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_modes_see_the_operator(name, grad, device):
    """A plain call is computed at once. A call under a mode goes through the dispatcher."""
    args = arguments(name, device)
    with Seen() as seen, torch.set_grad_enabled(grad):
        found = getattr(OPERATORS, name)(*args, **KWARGS[name])
    assert seen.names.count(f"dsa_tvm.{name}.default") == 1
    with torch.set_grad_enabled(grad):
        assert equal(found, getattr(OPERATORS, name)(*args, **KWARGS[name]))


@pytest.mark.parametrize("grad", [True, False, "inference"])
@pytest.mark.parametrize("name", OPS)
def test_a_plain_call_takes_the_short_way(name, grad, monkeypatch):
    """It gives what the long one gives."""
    args = arguments(name, "cpu", dtype=torch.bfloat16)
    operator, kwargs = getattr(OPERATORS, name), KWARGS[name]

    def run():
        with torch.inference_mode(grad == "inference"), torch.set_grad_enabled(grad is True):
            found = as_tuple(operator(*[x.clone() for x in args], **kwargs))
        return found, [(x.is_inference(), x.requires_grad, x.stride()) for x in found]

    long_way = dsa_tvm.torch_ops.call

    def refuse(*_):
        raise AssertionError("the long way")

    monkeypatch.setattr(dsa_tvm.torch_ops, "call", refuse)
    found, kinds = run()
    monkeypatch.setattr(dsa_tvm.torch_ops, "call", long_way)
    monkeypatch.setattr(dsa_tvm.torch_ops, "_is_plain", lambda keys: False)
    monkeypatch.setattr(frames, "call", lambda *_: None)
    expected, same_kinds = run()
    assert equal(found, expected) and kinds == same_kinds


def test_attributes_in_any_order():
    """By keyword, where one that is taken for another would be refused, or give another result."""
    args = arguments("dsa_attention", "cpu")
    kwargs = {"topk": 16, "sm_scale": 0.1, "d_v": 512}
    expected = OPERATORS.dsa_attention(*args, **kwargs)
    for order in itertools.permutations(kwargs):
        assert equal(OPERATORS.dsa_attention(*args, **{name: kwargs[name] for name in order}), expected)


def test_what_is_not_plain_takes_the_long_way(monkeypatch):
    """A strided tensor, and one that asks for gradients where none are recorded. What is refused is refused there."""
    logits, ks, ke = arguments("topk", "cpu")
    expected = OPERATORS.topk(logits, ks, ke, topk=3)
    taken = []
    long_way = dsa_tvm.torch_ops.call
    monkeypatch.setattr(dsa_tvm.torch_ops, "call", lambda *given: taken.append(1) or long_way(*given))
    for other in (torch.nn.Parameter(logits, requires_grad=False), logits.as_subclass(Subclass)):
        assert torch.equal(OPERATORS.topk(other, ks, ke, topk=3), expected) and not taken
    with torch.no_grad():
        assert torch.equal(OPERATORS.topk(logits.clone().requires_grad_(), ks, ke, topk=3), expected) and taken
    with pytest.raises(dsa_tvm.ArgumentError, match="expected a contiguous tensor"):
        OPERATORS.topk(logits.T.contiguous().T, ks, ke, topk=3)
    with pytest.raises(dsa_tvm.ArgumentError, match=r"topk: expected topk in 1\.\.4096, got -1"):
        OPERATORS.topk(logits, ks, ke, topk=-1)


def test_lazy_signs_are_resolved(device):
    """The dispatcher does so for every operator, in which the memory holds the other sign."""
    logits, ks, ke = arguments("topk", device)
    lazy = torch._neg_view(logits)
    assert lazy.is_neg()
    assert torch.equal(OPERATORS.topk(lazy, ks, ke, topk=3), OPERATORS.topk(-logits, ks, ke, topk=3))


def test_parameters_are_taken(device):
    q, kv, indices, _ = arguments("sparse_mla", device)
    kv = torch.nn.Parameter(kv, requires_grad=False)
    assert equal(dsa_tvm.sparse_mla(q, kv, indices, sm_scale=1), dsa_tvm.sparse_mla(q, kv.data, indices, sm_scale=1))


def test_fake_tensors_have_no_memory():
    logits, ks, ke = arguments("topk", "cpu")
    with FakeTensorMode() as mode, pytest.raises(dsa_tvm.ArgumentError, match=r"topk: logits: expected .*FakeTensor"):
        dsa_tvm.topk(mode.from_tensor(logits), ks, ke, 3)


class Selecting(torch.nn.Module):
    """A selection as in models: at most as many keys as there are."""

    def forward(self, q, k, weights, ks, ke):
        return OPERATORS.indexer_topk(q, k, weights, ks, ke, topk=min(64, k.shape[0]))


def test_topk_from_a_shape_compiles_once(device):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Selecting(), fullgraph=True, dynamic=True, backend=counter)
    for s_kv in (40, 41, 50, 63):
        args = arguments("lightning_indexer", device, s_kv=s_kv)
        found = compiled(*args)
        assert found.shape == (3, s_kv) and torch.equal(found, Selecting()(*args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [True, False])
def test_topk_from_a_shape_is_exported(strict):
    length = torch.export.Dim("s_kv", min=2, max=4096)
    shapes = (None, {0: length}, None, None, None)

    class Half(torch.nn.Module):
        def forward(self, q, k, weights, ks, ke):
            return OPERATORS.indexer_topk(q, k, weights, ks, ke, topk=k.shape[0] // 2 + 1)

    args = arguments("lightning_indexer", "cpu")
    exported = torch.export.export(Half(), args, dynamic_shapes=shapes, strict=strict)
    for s_kv in (7, 300):
        args = arguments("lightning_indexer", "cpu", s_kv=s_kv)
        assert torch.equal(exported.module()(*args), Half()(*args))


@pytest.mark.parametrize("name", OPS)
def test_attributes_are_required_and_integers_symbolic(name):
    schema = str(getattr(OPERATORS, name).default._schema)
    for attr in OPS[name].attrs:
        assert f" {'SymInt' if attr.kind is int else 'float'} {attr.name}" in schema and f"{attr.name}=" not in schema


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("wrong", ["rank", "dtype", "length"])
def test_fake_tensors_are_checked(name, wrong):
    """The error comes when a model is compiled, before it runs."""
    args = [x.to("meta") for x in arguments(name, "cpu")]
    x = args[1]
    args[1] = {"rank": x[None], "dtype": x.double(), "length": torch.cat([x, x], -1)}[wrong]
    with pytest.raises(dsa_tvm.ArgumentError, match=rf"{name}: \w+: expected .*, got "):
        getattr(OPERATORS, name)(*args, **KWARGS[name])


def test_reloading(device):
    args = arguments("topk", device)
    before = OPERATORS.topk
    expected = before(*args, topk=3)
    importlib.reload(dsa_tvm.torch_ops)
    assert torch.equal(before(*args, topk=3), expected) and torch.equal(OPERATORS.topk(*args, topk=3), expected)
    with pytest.raises(NotImplementedError, match="no backward"):
        test = arguments("lightning_indexer", device)
        OPERATORS.lightning_indexer(test[0].requires_grad_(), *test[1:]).nan_to_num(neginf=0).sum().backward()


class Subclass(torch.Tensor):
    """A tensor class from outside torch."""


def test_subclasses_are_torch_tensors(device):
    q, kv, indices, _ = arguments("sparse_mla", device, dtype=torch.bfloat16)
    expected = dsa_tvm.sparse_mla(q, kv, indices, sm_scale=0.04)
    found = dsa_tvm.sparse_mla(*(x.as_subclass(Subclass) for x in (q, kv, indices)), sm_scale=0.04)
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
