"""The ONNX models, run by ONNX Runtime without the compiled library, against the float64 references."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from compare import assert_close, tolerance_of
from samples import DTYPES

from dsa_tvm import pack_mla_rows
from dsa_tvm.errors import ArgumentError
from dsa_tvm.ops import OPS

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import compose, inliner  # noqa: E402
from ort_values import ort_value, widened  # noqa: E402

from dsa_tvm import export  # noqa: E402  # imports onnx

ATTRS = {
    "lightning_indexer": {},
    "topk": {"topk": 8},
    "indexer_topk": {"topk": 8},
    "sparse_mla": {"sm_scale": 0.125, "d_v": 64},
    "sparse_mla_fp8": {"sm_scale": 0.125, "d_v": 128},
    "dsa_attention": {"topk": 8, "sm_scale": 0.125, "d_v": 64},
    "write_rows": {},
}
SIZES = {"s_q": 5, "s_kv": 37, "h_idx": 4, "d_idx": 32, "h_q": 3, "d_qk": 160, "topk": 8}
SIZES |= {"batch": 3, "capacity": 9, "s_new": 7, "d_row": 6}
ALL_VARIANTS = [pytest.param(op, v, id=f"{op}-{'-'.join(v.values())}") for op in OPS for v in OPS[op].variants]
EMPTY = [{"s_q": 0}, {"s_kv": 0}, {"s_q": 0, "s_kv": 0}, {"s_kv": 3}, {"s_kv": 1, "s_q": 1}]


def evaluate(model, feeds):
    """Outputs of the model, as float32 if NumPy lacks their type."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(widened(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = {name: ort_value(np.ascontiguousarray(array)) for name, array in feeds.items()}
    return [x.numpy() for x in session.run_with_ort_values([o.name for o in session.get_outputs()], values)]


def make_feeds(op, variant=None, optional=(), seed=0, **sizes):
    """Random inputs by name, in the operator's order."""
    spec, rng = OPS[op], np.random.default_rng(seed)
    variant, sizes = variant or spec.variants[0], {**SIZES, **sizes}
    feeds = {}
    for tensor in spec.inputs:
        if tensor.optional and tensor.name not in optional:
            continue
        shape = [sizes[tensor.packs if d == "d_packed" else d] for d in tensor.shape]
        dtype = DTYPES[spec.dtype_of(tensor, variant)]
        if tensor.name == "ks":
            array = rng.integers(0, sizes["s_kv"] // 2 + 1, shape)
        elif tensor.name == "ke":
            array = rng.integers(sizes["s_kv"] // 2, sizes["s_kv"] + 1, shape)
        elif tensor.name == "indices":
            array = rng.integers(-2, sizes["s_kv"] + 2, shape)
        elif tensor.name == "topk_length":
            array = rng.integers(0, sizes["topk"] + 1, shape)
        elif tensor.name == "positions":
            array = rng.integers(-2, sizes["capacity"] + 2, shape)
        elif dtype == np.uint8 and not tensor.packs:
            array = rng.integers(0, 256, shape)
        elif dtype == np.int8:
            array = rng.integers(-4, 5, shape)
        else:
            array = rng.standard_normal(shape)
        feeds[tensor.name] = pack_mla_rows(array, ATTRS[op]["d_v"]) if tensor.packs else array.astype(dtype)
    return feeds


def check(op, feeds, variant=None, model=None, **attrs):
    spec, attrs = OPS[op], {**ATTRS[op], **attrs}
    optional = [t.name for t in spec.inputs if t.optional and t.name in feeds]
    model = model or export.build_model(op, variant, optional=optional, **attrs)
    expected = spec.reference(**feeds, **attrs)
    got = evaluate(model, feeds)
    element = spec.dtype_of(spec.inputs[0], variant or spec.variants[0])
    for tensor, x, y in zip(spec.outputs, got, expected, strict=True):
        if tensor.dtype == "int32":
            assert x.dtype == np.int32
            np.testing.assert_array_equal(x, y)
        else:
            assert_close(x, y, tolerance_of(spec, tensor.name, element))
    return got


def select(rows, ks=None, ke=None, topk=8):
    """The indices that the model selects, after a check against the reference."""
    logits = np.asarray(rows, np.float32)
    s_q, s_kv = logits.shape
    ks = np.zeros(s_q, np.int32) if ks is None else np.asarray(ks, np.int32)
    ke = np.full(s_q, s_kv, np.int32) if ke is None else np.asarray(ke, np.int32)
    return check("topk", {"logits": logits, "ks": ks, "ke": ke}, topk=topk)[0].tolist()


@pytest.mark.parametrize(("op", "variant"), ALL_VARIANTS)
@pytest.mark.parametrize("with_optional", [False, True])
def test_matches_reference_in_every_variant(op, variant, with_optional):
    optional = [t.name for t in OPS[op].inputs if t.optional] if with_optional else []
    feeds = make_feeds(op, variant, optional)
    if op in ("indexer_topk", "dsa_attention"):
        # Integers small enough for exact sums in float32: the selection is then the reference's.
        for name in ("q", "k", "weights") if op == "indexer_topk" else ("index_q", "index_k", "weights"):
            feeds[name] = np.round(feeds[name].astype(np.float32)).astype(feeds[name].dtype)
        for name in set(feeds) & {"k_scale", "index_k_scale"}:
            feeds[name] = np.exp2(np.round(feeds[name]))
    check(op, feeds, variant)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("with_optional", [False, True])
def test_empty_and_short_inputs(op, sizes, with_optional):
    optional = [t.name for t in OPS[op].inputs if t.optional] if with_optional else []
    check(op, make_feeds(op, optional=optional, **sizes))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("all_dims", [False, True])
@pytest.mark.parametrize("sizes", [{}, *EMPTY], ids=str)
def test_fixed_lengths(op, sizes, all_dims):
    """ONNX Runtime folds known shapes, so fixed lengths take other paths than symbolic ones."""
    optional = [t.name for t in OPS[op].inputs if t.optional]
    dims = {**SIZES, **sizes} if all_dims else {"s_kv": SIZES["s_kv"], **sizes}
    dims = {name: length for name, length in dims.items() if name in OPS[op].dims}
    model = export.build_model(op, optional=optional, dims=dims, **ATTRS[op])
    check(op, make_feeds(op, optional=optional, **sizes), model=model)


@pytest.mark.parametrize("optional", [(), ("attn_sink",), ("topk_length",), ("attn_sink", "topk_length")])
def test_each_set_of_optional_inputs(optional):
    check("sparse_mla", make_feeds("sparse_mla", optional=optional))
    if "topk_length" not in optional:
        check("dsa_attention", make_feeds("dsa_attention", optional=optional))


@pytest.mark.parametrize("op", ["lightning_indexer", "topk", "indexer_topk", "dsa_attention"])
def test_ranges_beyond_the_keys(op):
    feeds = make_feeds(op)
    feeds["ks"] = np.array([-5, 0, 30, 36, -(2**31)], np.int32)
    feeds["ke"] = np.array([3, 99, 10, 37, 2**31 - 1], np.int32)
    check(op, feeds)


def test_equal_values_go_by_lower_index():
    assert select(np.zeros((2, 50)), topk=4) == [[0, 1, 2, 3]] * 2
    assert select([[1, 2, 1, 2, 1, 2]], topk=4) == [[0, 1, 3, 5]]
    assert select([[-0.0, 0.0, -0.0, 0.0]], topk=2) == [[0, 1]]
    assert select(np.full((1, 20), -np.inf), topk=3) == [[0, 1, 2]]


def test_nan_is_never_selected():
    assert select([[np.nan, 1, np.nan, -np.inf]], topk=4) == [[1, 3, -1, -1]]
    assert select(np.full((1, 9), np.nan), topk=3) == [[-1, -1, -1]]
    assert select([[np.inf, -np.nan, 5]], topk=3) == [[0, 2, -1]]


def test_minus_infinity_ranks_below_every_finite_number():
    lowest = np.finfo(np.float32).min
    assert select([[-np.inf, lowest, -np.inf, lowest]], topk=3) == [[0, 1, 3]]
    assert select([[5, -np.inf, lowest, 7]], ks=[1], ke=[3], topk=4) == [[1, 2, -1, -1]]


@pytest.mark.parametrize("seed", range(20))
def test_selection_of_hostile_rows(seed):
    rng = np.random.default_rng(seed)
    s_kv, topk = int(rng.integers(1, 300)), int(rng.integers(1, 100))
    pool = np.array([0.0, -0.0, 1, -1, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], np.float32)
    ks, ke = rng.integers(-3, s_kv + 3, (2, 16))
    select(rng.choice(pool, (16, s_kv)), ks, ke, topk)


@pytest.mark.parametrize("sizes", [{}, {"h_idx": 1}, {"s_q": 1, "s_kv": 33, "h_idx": 1}], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "weights"])
def test_indexer_propagates_special_values(name, value, sizes):
    feeds = make_feeds("lightning_indexer", **sizes)
    feeds[name][0, ..., 3 % feeds[name].shape[-1]] = value
    with np.errstate(invalid="ignore"):
        check("lightning_indexer", feeds)


def test_nan_key_is_not_selected_by_the_indexer():
    feeds = make_feeds("indexer_topk", s_kv=10)
    feeds["k"][4] = np.nan
    feeds["ks"][:], feeds["ke"][:] = 0, 10
    (indices,) = check("indexer_topk", feeds, topk=10)
    assert (indices[:, -1] == -1).all() and not (indices == 4).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_unselected_rows_do_not_leak(value):
    feeds = make_feeds("sparse_mla", optional=("topk_length",))
    feeds["indices"] = np.array([[5, -1, 6, 37, 7, 2**31 - 1, -(2**31), 9]] * 5, np.int32)
    feeds["topk_length"][:] = [8, 3, 0, -4, 1]
    clean = check("sparse_mla", feeds)
    feeds["kv"][[0, 1, 2, 3, 4, 8, 36]] = value
    dirty = check("sparse_mla", feeds)
    for x, y in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(x, y)
    assert (clean[0][2:4] == 0).all()
    assert np.isneginf(clean[1][2:4]).all() and np.isposinf(clean[2][2:4]).all()


@pytest.mark.parametrize("where", [("q", (2, 1, 0)), ("kv", (6, 3)), ("kv", (6, 47))], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_special_values_of_selected_rows_propagate(where, value):
    feeds = make_feeds("sparse_mla", optional=("attn_sink",))
    feeds["indices"] = np.array([[5, 3, 6, -1, -1, -1, -1, -1], [1, 2, 3, 4, 5, 7, 8, 9]] * 2 + [[-1] * 8], np.int32)
    feeds[where[0]][where[1]] = value
    with np.errstate(invalid="ignore"):
        check("sparse_mla", feeds)


def test_nan_beside_infinity_is_nan():
    feeds = make_feeds("sparse_mla", h_q=1)
    feeds["q"] = np.abs(feeds["q"]) + 1
    feeds["kv"][1], feeds["kv"][2], feeds["kv"][3] = np.inf, np.nan, -np.inf
    feeds["indices"] = np.array([[1, 2, 3, 4], [4, 3, 1, -1], [3, -1, 3, -1], [3, 4, -1, -1], [2, 3, -1, -1]], np.int32)
    with np.errstate(invalid="ignore"):
        check("sparse_mla", feeds)


@pytest.mark.parametrize("sink", [-np.inf, -300.0, 0.0, 30.0, np.inf])
def test_sink_changes_out_only(sink):
    feeds = make_feeds("sparse_mla")
    _, *plain = check("sparse_mla", feeds)
    feeds["attn_sink"] = np.full(3, sink, np.float32)
    _, *sunk = check("sparse_mla", feeds)
    for x, y in zip(plain, sunk, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("optional", [(), ("index_k_scale", "attn_sink")])
def test_two_nodes_do_what_one_does(optional):
    feeds = make_feeds("dsa_attention", optional=optional)
    one, two = (
        evaluate(export.build_attention_model(**ATTRS["dsa_attention"], optional=optional, fused=fused), feeds)
        for fused in (True, False)
    )
    for x, y in zip(one, two, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("op", OPS)
def test_models_are_valid_onnx(op):
    for variant in OPS[op].variants:
        model = export.build_model(op, variant, dims={OPS[op].dims[0]: 4}, **ATTRS[op])
        onnx.checker.check_model(model, full_check=True)
        assert [f.name for f in model.functions] == [OPS[op].onnx_name]
        assert {n.domain for n in model.functions[0].node} == {""}
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 4


@pytest.mark.parametrize("opset", [19, 21])
def test_bodies_go_into_a_users_model(opset):
    """A model of two layers and a standard node gets one body for each operator, however often it is attached."""
    base = export.build_model("sparse_mla", **ATTRS["sparse_mla"])
    nodes = [
        export.operator_node("sparse_mla", ["q", "kv", "indices"], ["first"], **ATTRS["sparse_mla"]),
        export.operator_node("sparse_mla", ["q", "kv", "indices", None], ["second"], sm_scale=0.25, d_v=64),
        onnx.helper.make_node("Add", ["first", "second"], ["out"]),
    ]
    graph = onnx.helper.make_graph(nodes, "layers", base.graph.input, base.graph.output[:1])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    export.attach_bodies(model)
    export.attach_bodies(model)
    onnx.checker.check_model(model, full_check=True)
    assert len(model.functions) == 1
    feeds = make_feeds("sparse_mla")
    (got,) = evaluate(model, feeds)
    expected = sum(OPS["sparse_mla"].reference(**feeds, sm_scale=s, d_v=64)[0] for s in (0.125, 0.25))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_nodes_with_different_optional_inputs_do_not_share_a_body():
    base = export.build_model("sparse_mla", optional=("attn_sink",), **ATTRS["sparse_mla"])
    base.graph.node.append(export.operator_node("sparse_mla", ["q", "kv", "indices"], ["x"], **ATTRS["sparse_mla"]))
    before = base.SerializeToString(deterministic=True)
    with pytest.raises(ArgumentError, match=r"sparse_mla.*expected.*attn_sink.*got none"):
        export.attach_bodies(base)
    assert base.SerializeToString(deterministic=True) == before


def renaming(how):
    """Two layers in one model, with functions that a tool has renamed."""
    base = export.build_model("sparse_mla", **ATTRS["sparse_mla"])
    if how == "add_prefix":
        return compose.add_prefix(base, "a_")
    if how == "twice":
        return compose.add_prefix(compose.add_prefix(base, "a_"), "b_")
    return compose.merge_models(base, base, [], prefix1="a_", prefix2="b_")


@pytest.mark.parametrize("restore", [export.attach_bodies, export.detach_bodies])
@pytest.mark.parametrize("how", ["add_prefix", "twice", "merge_models"])
def test_renamed_bodies_get_their_names_back(how, restore):
    """Under another name, the kernel of the library is not found, and the body runs in its place."""
    model = renaming(how)
    assert all(f.name != "SparseMLA" for f in model.functions)
    restore(model)
    onnx.checker.check_model(model)
    assert {(n.domain, n.op_type) for n in model.graph.node} == {("ai.dsa", "SparseMLA")}
    assert [f.name for f in model.functions] == (["SparseMLA"] if restore is export.attach_bodies else [])
    if restore is export.attach_bodies:
        feeds = make_feeds("sparse_mla")
        expected = OPS["sparse_mla"].reference(**feeds, **ATTRS["sparse_mla"])
        prefixes = {"add_prefix": ["a_"], "twice": ["b_a_"], "merge_models": ["a_", "b_"]}[how]
        got = evaluate(model, {f"{p}{n}": x for p in prefixes for n, x in feeds.items()})
        for x, y in zip(got, expected * len(prefixes), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_functions_of_others_keep_their_names():
    """Also in our domain: a function with other arguments is not one of ours."""
    model = export.build_model("topk", topk=8)
    other = onnx.helper.make_function(
        *("ai.dsa", "MyTopKIndices", ["x"], ["y"], [onnx.helper.make_node("Neg", ["x"], ["y"])]),
        [onnx.helper.make_opsetid("", 20)],
    )
    model.functions.append(other)
    export.detach_bodies(model)
    assert [f.name for f in model.functions] == ["MyTopKIndices"]
    model.graph.node.append(onnx.helper.make_node("MyTopKIndices", ["logits"], ["z"], domain="ai.dsa"))
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(ArgumentError, match=r"expected one of LightningIndexer, .*, got 'MyTopKIndices'"):
        export.attach_bodies(model)
    assert model.SerializeToString(deterministic=True) == before


def test_nodes_without_bodies_survive_inlining():
    model = export.build_model("sparse_mla", **ATTRS["sparse_mla"])
    assert not any(n.domain == "ai.dsa" for n in inliner.inline_local_functions(model).graph.node)
    export.detach_bodies(model)
    kept = inliner.inline_local_functions(model)
    export.attach_bodies(kept)
    assert [n.op_type for n in kept.graph.node] == ["SparseMLA"]
    check("sparse_mla", make_feeds("sparse_mla"), model=kept)


BAD = [
    ("topk", {}, r"topk: attribute topk: expected int, as it is required, got none"),
    ("topk", {"topk": 0}, r"topk: attribute topk: expected 1\.\.4096, got 0"),
    ("topk", {"topk": 2.5}, r"topk: attribute topk: expected int, got 2\.5"),
    ("topk", {"topk": True}, r"topk: attribute topk: expected int, got True"),
    ("topk", {"topk": 4, "k": 1}, r"topk: attribute k: expected any of topk, got 'k'"),
    ("topk", {"topk": 4, "dims": {"h_q": 1}}, r"topk: dimension h_q: expected one of s_q, s_kv, topk, got 'h_q'"),
    ("topk", {"topk": 4, "dims": {"topk": 5}}, r"topk: dimension topk: expected 4.*got 5"),
    ("topk", {"topk": 4, "variant": {"T": "float32"}}, r"topk: variant"),
    ("topk", {"topk": 4, "optional": ["k_scale"]}, r"topk: optional inputs: .*got 'k_scale'"),
    ("sparse_mla", {"sm_scale": "x", "d_v": 64}, r"sparse_mla: attribute sm_scale: expected float, got 'x'"),
    (
        "sparse_mla",
        {"sm_scale": float("nan"), "d_v": 64},
        r"sparse_mla: attribute sm_scale: expected a finite float32, got nan",
    ),
    ("sparse_mla", {"sm_scale": 1, "d_v": 7}, r"sparse_mla: attribute d_v: expected .*64\.\.1024, got 7"),
    ("sparse_mla", {"sm_scale": 1, "d_v": 64, "dims": {"d_qk": 32}}, r"d_v: expected at most d_qk"),
    ("nothing", {}, r"nothing: operator: expected one of"),
]


@pytest.mark.parametrize(("op", "arguments", "message"), BAD)
def test_bad_arguments(op, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        export.build_model(op, **arguments)


def test_bad_nodes():
    with pytest.raises(ArgumentError, match="topk: inputs: expected 3, got 2"):
        export.operator_node("topk", ["logits", "ks"], ["i"], topk=4)
    with pytest.raises(ArgumentError, match="sparse_mla: input kv: expected the name of a value"):
        export.operator_node("sparse_mla", ["q", None, "i"], ["o"], sm_scale=1, d_v=64)
    with pytest.raises(ArgumentError, match="opset: expected at least 19, got 18"):
        export.function_body("topk", opset=18)


@pytest.mark.parametrize("dims", [{}, {"s_q": 1}], ids=str)
def test_plain_models_compute_the_same(dims):
    """They agree if every row has topk keys in range and nothing is NaN."""
    sizes = {"s_q": 1} if dims else {}
    feeds = make_feeds("dsa_attention", **sizes)
    attrs = ATTRS["dsa_attention"]
    (out,) = evaluate(export.build_plain_attention_model(dims=dims, **attrs), feeds)
    assert_close(
        out, OPS["dsa_attention"].reference(**feeds, **attrs)[0], OPS["dsa_attention"].tolerance["out"]["float32"]
    )

    feeds = make_feeds("lightning_indexer", **sizes)
    (logits,) = evaluate(export.build_plain_model("lightning_indexer", dims=dims), feeds)
    assert_close(
        logits, *OPS["lightning_indexer"].reference(**feeds), OPS["lightning_indexer"].tolerance["logits"]["float32"]
    )

    feeds = make_feeds("topk", **sizes)
    (indices,) = evaluate(export.build_plain_model("topk", topk=8, dims=dims), feeds)
    np.testing.assert_array_equal(np.sort(indices), *OPS["topk"].reference(**feeds, topk=8))

    feeds = make_feeds("sparse_mla", **sizes)
    feeds["indices"] = np.minimum(feeds["indices"], 36)
    (out,) = evaluate(export.build_plain_model("sparse_mla", dims=dims, **ATTRS["sparse_mla"]), feeds)
    expected = OPS["sparse_mla"].reference(**feeds, **ATTRS["sparse_mla"])[0]
    assert_close(out, expected, OPS["sparse_mla"].tolerance["out"]["float32"])


def test_import_is_light():
    code = "import sys, dsa_tvm.export; print([m for m in ('tvm', 'torch', 'onnxruntime') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
