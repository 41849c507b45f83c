"""The operators in ONNX Runtime, computed by the compiled library, against the float64 references."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from samples import DTYPES

import dsa_tvm
from dsa_tvm.ops import OPS

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument  # noqa: E402
from ort_values import ort_value, widened  # noqa: E402

from dsa_tvm import export  # noqa: E402  # imports onnx

SIZES = {"s_q": 5, "s_kv": 70, "h_idx": 4, "d_idx": 32, "h_q": 3, "d_qk": 576, "topk": 8}
SIZES |= {"batch": 3, "capacity": 9, "s_new": 7, "d_row": 6}
ATTRS = {"topk": 8, "sm_scale": 0.0625, "d_v": 512}
EVERYTHING = [pytest.param(op, v, id="-".join((op, *v.values()))) for op in OPS for v in OPS[op].variants]


def attrs_of(op):
    return {a.name: ATTRS[a.name] for a in OPS[op].attrs}


def optional_of(op):
    return tuple(t.name for t in OPS[op].inputs if t.optional)


def make_model(op, variant=None, optional=(), *, shapes=True, **attrs):
    """A model without function bodies, so that only the library can run it."""
    model = export.build_model(op, variant, optional=optional, **{**attrs_of(op), **attrs})
    del model.functions[:]
    for value in (*model.graph.input, *model.graph.output) if not shapes else ():
        value.type.tensor_type.ClearField("shape")
    return model


def make_inputs(op, variant=None, optional=(), **sizes):
    """Random inputs by name, in the element types of the variant."""
    spec, rng, sizes = OPS[op], np.random.default_rng(7), {**SIZES, **sizes}
    made = {}
    for tensor in spec.inputs:
        if tensor.optional and tensor.name not in optional:
            continue
        shape = [sizes[tensor.packs if d == "d_packed" else d] for d in tensor.shape]
        dtype = spec.dtype_of(tensor, variant or spec.variants[0])
        if tensor.name == "ks":
            array = rng.integers(0, 4, shape)
        elif tensor.name in ("ke", "indices", "topk_length"):
            array = rng.integers(-2, {"ke": sizes["s_kv"], "indices": sizes["s_kv"]}.get(tensor.name, 8) + 3, shape)
        elif tensor.name == "positions":
            array = rng.integers(-2, sizes["capacity"] + 2, shape)
        elif dtype == "uint8" and not tensor.packs:
            array = rng.integers(0, 256, shape)
        elif dtype == "int8":
            array = rng.integers(-4, 5, shape)
        else:
            array = rng.standard_normal(shape)
        made[tensor.name] = dsa_tvm.pack_mla_rows(array) if tensor.packs else array.astype(DTYPES[dtype])
    return made


def options(**fields):
    made = ort.SessionOptions()
    made.log_severity_level = 4
    for name, value in fields.items():
        setattr(made, name, value)
    made.register_custom_ops_library(dsa_tvm.get_library_path())
    return made


@pytest.fixture
def provider(device):
    """The execution provider of a device."""
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if name not in ort.get_available_providers():
        pytest.skip(f"this ONNX Runtime has no {name}: onnxruntime-gpu has")
    return name


def make_session(model, session_options=None, provider="CPUExecutionProvider"):
    data = model if isinstance(model, bytes) else model.SerializeToString()
    chosen = session_options or options()
    if provider != "CPUExecutionProvider":
        # With this, a node that falls back to the CPU is an error.
        chosen.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return ort.InferenceSession(data, chosen, providers=[provider])


def run(session, inputs):
    values = {name: ort_value(array) for name, array in inputs.items()}
    outputs = session.run_with_ort_values([o.name for o in session.get_outputs()], values)
    return [x.numpy() for x in outputs]


def assert_matches(op, variant, outputs, inputs, device="cpu"):
    spec = OPS[op]
    for tensor, actual, expected in zip(spec.outputs, outputs, spec.reference(**inputs, **attrs_of(op)), strict=True):
        tolerance = tolerance_of(spec, tensor.name, spec.dtype_of(spec.inputs[0], variant), device)
        assert_close(actual, expected, tolerance)


@pytest.mark.parametrize(("op", "variant"), EVERYTHING)
def test_matches_the_reference(op, variant, device, provider):
    optional = optional_of(op)
    # None, all, and the last one only: in the middle, the input before it is then left empty.
    for chosen in sorted({(), optional, optional[1:]}):
        inputs = make_inputs(op, variant, chosen)
        session = make_session(widened(make_model(op, variant, chosen)), provider=provider)
        assert_matches(op, variant, run(session, inputs), inputs, device)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sizes", [{"s_q": 0}, {"s_kv": 0}, {"s_q": 0, "s_kv": 0}, {"s_q": 1, "s_kv": 1}], ids=str)
def test_empty_and_single_lengths(op, sizes, device, provider):
    inputs = make_inputs(op, optional=optional_of(op), **sizes)
    session = make_session(widened(make_model(op, optional=optional_of(op))), provider=provider)
    assert_matches(op, OPS[op].variants[0], run(session, inputs), inputs, device)


def has_shape_inference():
    """Older versions crash where an optional input is left out, so that the library offers them none."""
    return tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 24)


@pytest.mark.skipif(not has_shape_inference(), reason="this ONNX Runtime infers no shapes of custom operators safely")
@pytest.mark.parametrize(("op", "variant"), EVERYTHING)
def test_symbolic_shapes_are_inferred(op, variant):
    model = make_model(op, variant)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    shapes = [o.shape for o in make_session(model).get_outputs()]
    # A length that an attribute gives is a number; the others keep the name the model's inputs have for them.
    fixed = attrs_of(op)
    assert shapes == [[fixed.get(d, d) for d in t.shape] for t in OPS[op].outputs]


@pytest.mark.skipif(not has_shape_inference(), reason="this ONNX Runtime infers no shapes of custom operators safely")
def test_shapes_pass_from_node_to_node():
    model = export.build_attention_model({"T": "bfloat16", "K": "float8_e4m3fn"}, **ATTRS, dims={"h_q": 3}, fused=False)
    del model.functions[:], model.graph.value_info[:]
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    assert [o.shape for o in make_session(model).get_outputs()] == [["s_q", 3, 512], ["s_q", 3]]


def test_unknown_shapes_stay_unknown():
    session = make_session(make_model("sparse_mla", shapes=False))
    assert [o.shape for o in session.get_outputs()] == [[], [], []]
    inputs = make_inputs("sparse_mla")
    assert_matches("sparse_mla", {"T": "float32"}, run(session, inputs), inputs)


REFUSED = [
    ("lightning_indexer", {}, {"k": (70, 32, 1)}, "k: expected rank 2"),
    ("lightning_indexer", {}, {"q": ()}, "q: expected rank 3"),
    ("lightning_indexer", {}, {"q": (1, 1, 1, 1, 1, 1, 1, 1, 1, 1)}, "q: expected rank 3"),
    ("lightning_indexer", {}, {"weights": (5, 3)}, "weights: expected shape"),
    ("lightning_indexer", {}, {"q": (5, 4, 33), "k": (70, 33)}, "q: expected d_idx to be one this library serves"),
    ("lightning_indexer", {}, {"q": (5, 65, 32), "weights": (5, 65)}, "q: expected h_idx in 1..64"),
    ("topk", {"topk": 0}, {}, "topk: expected topk in 1..4096"),
    ("topk", {"topk": 2**40}, {}, "topk: expected topk in 1..4096"),
    ("sparse_mla", {"d_v": 511}, {}, "d_v: expected d_v to be one this library serves"),
    ("sparse_mla", {"sm_scale": float("nan")}, {}, "sm_scale: expected a finite float32"),
    ("sparse_mla", {}, {"attn_sink": (4,)}, "attn_sink: expected shape"),
    ("dsa_attention", {}, {"ke": (4,)}, "ke: expected shape"),
]


@pytest.mark.parametrize(("op", "attrs", "shapes", "message"), REFUSED, ids=[f"{r[0]}-{r[3][:20]}" for r in REFUSED])
def test_wrong_arguments_are_named(op, attrs, shapes, message):
    optional = optional_of(op)
    model = make_model(op, optional=optional, shapes=False)
    for attribute in model.graph.node[0].attribute:
        if attribute.name in attrs:
            attribute.CopyFrom(onnx.helper.make_attribute(attribute.name, attrs[attribute.name]))
    inputs = make_inputs(op, optional=optional)
    inputs.update({name: np.zeros(shape, inputs[name].dtype) for name, shape in shapes.items()})
    session = make_session(model)
    for _ in range(2):  # a refused call leaves the session as it was
        with pytest.raises(InvalidArgument, match=f"{op}: {message}"):
            run(session, inputs)


@pytest.mark.parametrize("value", [None, 3, "wide"])
def test_a_missing_attribute_is_named(value):
    model = make_model("sparse_mla")
    kept = [a for a in model.graph.node[0].attribute if a.name != "sm_scale"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    if value is not None:
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("sm_scale", value))
    with pytest.raises(Exception, match="sparse_mla: sm_scale: expected the node to have this attribute as a float"):
        make_session(model)


def test_types_that_are_not_served_are_refused():
    model = make_model("lightning_indexer")
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    with pytest.raises(Exception, match="LightningIndexer"):
        make_session(model)


def test_the_library_is_preferred_to_the_body():
    model = export.build_model("lightning_indexer")
    inputs = make_inputs("lightning_indexer", d_idx=40)  # the body serves this width, the library does not
    with pytest.raises(InvalidArgument, match="d_idx"):
        run(make_session(model), inputs)


def test_one_process_may_register_many_times():
    inputs = make_inputs("topk")
    for _ in range(3):
        assert_matches("topk", {}, run(make_session(make_model("topk")), inputs), inputs)


@pytest.mark.parametrize("op", OPS)
def test_threads_do_not_change_a_bit(op):
    inputs = make_inputs(op, optional=optional_of(op), s_q=33, s_kv=1500, h_q=16)
    model = widened(make_model(op, optional=optional_of(op)))
    one, four = (run(make_session(model, options(intra_op_num_threads=n)), inputs) for n in (1, 4))
    for a, b in zip(one, four, strict=True):
        assert a.tobytes() == b.tobytes()


def test_sixteen_sessions_at_once():
    data = make_model("dsa_attention", optional=optional_of("dsa_attention")).SerializeToString()
    inputs = make_inputs("dsa_attention", optional=optional_of("dsa_attention"), s_q=9, s_kv=300)
    expected = [x.tobytes() for x in run(make_session(data), inputs)]

    def work(_):
        session = make_session(data, options(intra_op_num_threads=2))
        return [[x.tobytes() for x in run(session, inputs)] for _ in range(5)]

    with ThreadPoolExecutor(16) as pool:
        for results in pool.map(work, range(16)):
            assert results == [expected] * 5


@pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="needs tvm")
@pytest.mark.parametrize("order", ["before", "after"])
def test_tvm_in_the_same_process(order, tmp_path):
    (tmp_path / "model.onnx").write_bytes(make_model("topk").SerializeToString())
    load = [
        "import onnxruntime as ort, numpy as np, dsa_tvm",
        "options = ort.SessionOptions()",
        "options.register_custom_ops_library(dsa_tvm.get_library_path())",
        "session = ort.InferenceSession('model.onnx', options)",
    ]
    steps = ["import tvm", *load] if order == "before" else [*load, "import tvm"]
    steps += [
        "logits = np.arange(70, dtype=np.float32)[None]",
        "feeds = {'logits': logits, 'ks': np.zeros(1, np.int32), 'ke': np.full(1, 70, np.int32)}",
        "assert session.run(None, feeds)[0].tolist() == [list(range(62, 70))]",
        "a = tvm.runtime.tensor(np.ones(4, 'float32'))",
        "assert a.numpy().sum() == 4",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(steps)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
