"""The ONNX schemas of the operators, and torch models exported with them, run with and without the library."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import dsa_tvm
from dsa_tvm.ops import OPS

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, checker, defs, helper, shape_inference  # noqa: E402

from dsa_tvm import export  # noqa: E402

ATTRS = {"topk": 8, "sm_scale": 0.0625, "d_v": 512}


@pytest.fixture(autouse=True)
def schemas():
    """Register the schemas for these tests only."""
    export.register_schemas()
    yield
    for spec in OPS.values():
        defs.deregister_schema(spec.onnx_name, 1, "ai.dsa")


def make_model(op, variant=None, *, optional=(), dims=None, bodies=False, **attrs):
    """A model of one node whose outputs have no shapes."""
    given = {a.name: ATTRS[a.name] for a in OPS[op].attrs} | attrs
    model = export.build_model(op, variant, optional=optional, dims=dims, **given)
    if not bodies:
        export.detach_bodies(model)
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return model


def inferred(model):
    model = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = [o.type.tensor_type for o in model.graph.output]
    return [t.elem_type for t in types], [[d.dim_value or d.dim_param for d in t.shape.dim] for t in types]


@pytest.mark.parametrize(
    ("op", "variant"), [pytest.param(op, v, id="-".join((op, *v.values()))) for op in OPS for v in OPS[op].variants]
)
@pytest.mark.parametrize("bodies", [False, True])
@pytest.mark.parametrize("with_optional", [False, True])
def test_types_and_shapes_are_inferred(op, variant, bodies, with_optional):
    optional = [t.name for t in OPS[op].inputs if t.optional] if with_optional else []
    length = {OPS[op].inputs[0].shape[0]: 4}
    kinds, shapes = inferred(make_model(op, variant, optional=optional, dims=length, bodies=bodies))
    spec, fixed = OPS[op], {**ATTRS, **length}
    # A symbolic length keeps its name in the model.
    assert shapes == [[fixed.get(d, d) for d in t.shape] for t in spec.outputs]
    numbers = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "float16": 10, "bfloat16": 16, "float8_e4m3fn": 17}
    assert kinds == [numbers[spec.dtype_of(t, variant)] for t in spec.outputs]


def test_a_length_comes_from_any_input_that_has_it():
    model = make_model("sparse_mla")
    model.graph.input[2].type.tensor_type.shape.dim[0].dim_value = 7  # indices
    assert inferred(model)[1] == [[7, "h_q", 512], [7, "h_q"], [7, "h_q"]]


def test_unknown_shapes_stay_unknown():
    model = make_model("sparse_mla")
    for value in model.graph.input:
        value.type.tensor_type.ClearField("shape")
    shapes = inferred(model)[1]
    assert [len(shape) for shape in shapes] == [3, 2, 2] and shapes[0][2] == 512
    # ONNX gives each a different name.
    others = [*shapes[0][:2], *shapes[1], *shapes[2]]
    assert len(set(others)) == 6 and not any(isinstance(length, int) for length in others)


@pytest.mark.parametrize("op", OPS)
def test_the_checker_knows_every_operator(op):
    given = {a.name: ATTRS[a.name] for a in OPS[op].attrs}
    for bodies in (True, False):
        model = export.build_model(op, **given)
        if not bodies:
            export.detach_bodies(model)
        checker.check_model(model, full_check=True)
        for name in given:
            attributes = [a for a in model.graph.node[0].attribute if a.name != name]
            wrong = onnx.ModelProto.FromString(model.SerializeToString())
            del wrong.graph.node[0].attribute[:]
            wrong.graph.node[0].attribute.extend(attributes)
            with pytest.raises(checker.ValidationError, match=f"Required attribute '{name}' is missing"):
                checker.check_model(wrong)


def change(i, axis, length):
    def apply(model):
        model.graph.input[i].type.tensor_type.shape.dim[axis].dim_value = length

    return apply


def retype(i, kind):
    def apply(model):
        model.graph.input[i].type.tensor_type.elem_type = kind

    return apply


def rank(i):
    def apply(model):
        model.graph.input[i].type.tensor_type.shape.dim.add().dim_value = 1

    return apply


WRONG = [
    ("sparse_mla", {"d_qk": 576}, change(1, 1, 512), "sparse_mla: kv: expected d_qk of 576, got 512"),
    ("sparse_mla", {}, change(2, 1, 5000), r"sparse_mla: indices: expected topk in 1\.\.4096, got 5000"),
    ("sparse_mla", {}, rank(1), r"sparse_mla: kv: expected rank 2 \[s_kv, d_qk\], got rank 3"),
    ("sparse_mla_fp8", {"d_qk": 576}, change(1, 1, 640), "sparse_mla_fp8: kv: expected d_packed of 656, got 640"),
    ("lightning_indexer", {}, retype(1, TensorProto.FLOAT16), "lightning_indexer: k: expected a type .*, got FLOAT16"),
    ("topk", {}, retype(1, TensorProto.INT64), r"ks typestr: tensor\(int32\), has unsupported type: tensor\(int64\)"),
]


@pytest.mark.parametrize(("op", "dims", "spoil", "words"), WRONG, ids=[w[3][:40] for w in WRONG])
def test_what_does_not_go_together_is_refused(op, dims, spoil, words):
    model = make_model(op, dims=dims)
    spoil(model)
    with pytest.raises(shape_inference.InferenceError, match=words):
        inferred(model)


def test_registering_twice_changes_nothing():
    export.register_schemas()
    assert defs.get_schema("DsaAttention", 1, "ai.dsa").attributes["sm_scale"].required


def torch_inputs(torch, s_q, s_kv):
    torch.manual_seed(s_q)
    index = (torch.randn(s_q, 8, 64), torch.randn(s_kv, 64), torch.rand(s_q, 8))
    ranges = (torch.zeros(s_q, dtype=torch.int32), torch.full((s_q,), s_kv, dtype=torch.int32))
    return (*index, *ranges, torch.randn(s_q, 4, 576), torch.randn(s_kv, 576))


def layer(torch, topk=lambda k: 16):
    """A module that calls our operators between others."""

    class Layer(torch.nn.Module):
        def forward(self, index_q, index_k, weights, ks, ke, q, kv):
            ops = torch.ops.dsa_tvm
            indices = ops.indexer_topk(torch.relu(index_q), index_k, weights, ks, ke, topk=topk(index_k))
            out, _, lse = ops.sparse_mla(q, kv, indices, sm_scale=0.04, d_v=512)
            whole, _ = ops.dsa_attention(index_q, index_k, weights, ks, ke, q, kv, topk=8, sm_scale=0.03, d_v=512)
            return out + whole, lse, indices

    return Layer()


def exported(torch, module, **kwargs):
    s_q, s_kv = torch.export.Dim("s_q"), torch.export.Dim("s_kv")
    shapes = tuple({0: n} for n in (s_q, s_kv, s_q, s_q, s_q, s_q, s_kv))
    program = torch.onnx.export(module, torch_inputs(torch, 3, 50), dynamic_shapes=shapes, verbose=False, **kwargs)
    return program.model_proto


def assert_runs(torch, module, model, with_library):
    options = ort.SessionOptions()
    if with_library:
        options.register_custom_ops_library(dsa_tvm.get_library_path())
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for lengths in ((3, 50), (1, 7), (5, 300)):
        inputs = torch_inputs(torch, *lengths)
        feeds = {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)}
        for x, y in zip(session.run(None, feeds), module(*inputs), strict=True):
            np.testing.assert_allclose(x, y.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_torch_models_are_exported():
    """One graph serves all lengths. ONNX Runtime runs it with and without the library."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    table = export.translation_table()
    assert len(table) == len(OPS)
    module = layer(torch)
    model = exported(torch, module, custom_translation_table=table)
    kinds = [(n.domain, n.op_type) for n in model.graph.node if n.domain]
    assert kinds == [("ai.dsa", "IndexerTopK"), ("ai.dsa", "SparseMLA"), ("ai.dsa", "DsaAttention")]
    assert [[d.dim_value or d.dim_param for d in o.type.tensor_type.shape.dim] for o in model.graph.output] == [
        ["s_q", 4, 512],
        ["s_q", 4],
        ["s_q", 16],
    ]
    checker.check_model(model, full_check=True)
    assert_runs(torch, module, model, with_library=True)
    export.attach_bodies(model)
    checker.check_model(model, full_check=True)
    for with_library in (True, False):
        assert_runs(torch, module, model, with_library)


@pytest.mark.filterwarnings("ignore")
def test_an_attribute_from_a_shape_is_refused():
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    module = layer(torch, topk=lambda k: k.shape[0] // 2)
    with pytest.raises(Exception, match=r"[Ee]xport") as raised:
        exported(torch, module, custom_translation_table=export.translation_table())
    causes, error = [], raised.value
    while error is not None:
        causes.append(str(error))
        error = error.__cause__
    assert any("indexer_topk: attribute topk: expected a number" in cause for cause in causes), causes


@pytest.mark.filterwarnings("ignore")
def test_symbolic_nodes_are_exported():
    """Torch's own way to write a node, for a model that is only ever exported."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")

    class Symbolic(torch.nn.Module):
        def forward(self, logits, ks, ke):
            shape, attrs = (logits.shape[0], 8), {"topk": 8}
            nodes = torch.onnx.ops.symbolic_multi_out
            return nodes(
                "ai.dsa::TopKIndices", (logits, ks, ke), attrs, dtypes=(torch.int32,), shapes=(shape,), version=1
            )

    s_q, s_kv = torch.export.Dim("s_q"), torch.export.Dim("s_kv")
    zeros = (torch.zeros(3, 50), torch.zeros(3, dtype=torch.int32), torch.full((3,), 50, dtype=torch.int32))
    program = torch.onnx.export(
        Symbolic(), zeros, dynamic_shapes=({0: s_q, 1: s_kv}, {0: s_q}, {0: s_q}), verbose=False
    )
    model = program.model_proto
    export.attach_bodies(model)
    logits, n = np.random.default_rng(0).standard_normal((2, 31), np.float32), np.full(2, 31, np.int32)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = dict(zip([i.name for i in session.get_inputs()], (logits, 0 * n, n), strict=True))
    np.testing.assert_array_equal(session.run(None, feeds)[0], dsa_tvm.topk(logits, 0 * n, n, 8))


def test_without_torch():
    """Only the table needs torch, and it says so."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from dsa_tvm import export\n"
        "export.register_schemas()\n"
        "try: export.translation_table()\n"
        "except ImportError as error: print('torch' in str(error))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_onnxscript_has_the_operators():
    onnxscript = pytest.importorskip("onnxscript")
    opset = onnxscript.values.Opset("ai.dsa", 1)
    assert all(spec.onnx_name in opset for spec in OPS.values())
    assert helper.make_opsetid("ai.dsa", 1).version == opset.version
