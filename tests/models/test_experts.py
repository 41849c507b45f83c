"""A layer's experts as one `Scan` of an exported model, against Transformers' experts."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from small_models import make, prompt  # noqa: E402
from transformers import DeepseekV32Config  # noqa: E402
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Experts  # noqa: E402

from dsa_tvm.models.onnx import Generator, experts, export_model  # noqa: E402

HIDDEN, INNER = 24, 10


def module_of(number: int, dtype=torch.float32, **settings) -> DeepseekV32Experts:
    torch.manual_seed(0)
    config = DeepseekV32Config(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=number, **settings)
    config._experts_implementation = "eager"
    made = DeepseekV32Experts(config)
    for x in made.parameters():
        torch.nn.init.normal_(x, std=0.3)
    return made.to(dtype)


def session_of(module, top_k: int) -> ort.InferenceSession:
    """A model of nothing but a layer's experts."""
    weights = {"gate_up": module.gate_up_proj, "down": module.down_proj}
    kind = helper.np_dtype_to_tensor_dtype(module.down_proj.detach().numpy().dtype)
    node = helper.make_node("Experts", ["x", "index", "weights", *weights], ["out"], domain="dsa_tvm.export")
    graph = helper.make_graph(
        [node],
        "experts",
        [
            helper.make_tensor_value_info("x", kind, ["n", HIDDEN]),
            helper.make_tensor_value_info("index", TensorProto.INT64, ["n", top_k]),
            helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["n", top_k]),
        ],
        [helper.make_tensor_value_info("out", kind, ["n", HIDDEN])],
        [numpy_helper.from_array(x.detach().numpy(), name) for name, x in weights.items()],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("dsa_tvm.export", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    experts.as_scans(model)
    onnx.checker.check_model(model, full_check=True)
    assert [x.domain for x in model.opset_import] == [""]
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.float16, 4e-3)])
@pytest.mark.parametrize(("number", "top_k"), [(1, 1), (5, 2), (33, 8)])
def test_against_transformers(number, top_k, dtype, close):
    """One token and many, experts that nobody has chosen, one that all have, a weight of 0, no token."""
    module = module_of(number, dtype)
    session = session_of(module, top_k)
    random = torch.Generator().manual_seed(1)
    for n in (1, 2, 19, 0):
        x = torch.randn(n, HIDDEN, generator=random).to(dtype)
        index = torch.rand(n, number, generator=random).argsort(-1)[:, :top_k].contiguous()
        weights = torch.randn(n, top_k, generator=random)
        weights[n // 2 :, 0] = 0
        for chosen in (index, torch.arange(top_k).expand(n, -1).contiguous()):
            feeds = {"x": x.numpy(), "index": chosen.numpy(), "weights": weights.numpy()}
            got = session.run(None, feeds)[0]
            with torch.no_grad():
                expected = module.double()(x.double(), chosen, weights.double())
            module.to(dtype)
            assert got.dtype == x.numpy().dtype
            np.testing.assert_allclose(got, expected.numpy(), rtol=close, atol=close * 2)


def test_a_token_keeps_its_nan():
    """And one whose weight is NaN gets it; others do not."""
    module = module_of(4)
    session = session_of(module, 2)
    x = np.ones((4, HIDDEN), np.float32)
    weights = np.ones((4, 2), np.float32)
    x[1, 3], weights[2, 1] = np.nan, np.nan
    index = np.array([[0, 1], [1, 2], [3, 1], [2, 0]])
    got = session.run(None, {"x": x, "index": index, "weights": weights})[0]
    assert np.isnan(got).any(-1).tolist() == [False, True, True, False]


def test_the_graph_does_not_grow(tmp_path):
    """Two weights a layer, whatever the number of experts; the tokens are those of Transformers."""
    model = make("glm", n_routed_experts=48, num_experts_per_tok=5)
    export_model(model, tmp_path / "model")
    graph = onnx.load(tmp_path / "model" / "model.onnx", load_external_data=False).graph
    stacked = [list(x.dims) for x in graph.initializer if len(x.dims) == 3 and x.dims[0] == 48]
    assert sorted(stacked) == [[48, 128, 64], [48, 128, 128]]
    assert sum(node.op_type == "Scan" for node in graph.node) == 1 and len(graph.node) < 600
    ids, _ = prompt(1, 150)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)[:, 150:].tolist()
    for library in (True, False):
        assert Generator(tmp_path / "model", library=library).generate(ids.tolist(), 6) == expected


def test_what_is_not_served_stays_with_transformers():
    """Another activation is translated expert by expert, as before."""
    assert experts._served(module_of(2))
    assert not experts._served(module_of(2, hidden_act="gelu"))
    before = dict(experts.moe.ALL_EXPERTS_FUNCTIONS)
    with experts.traced():
        assert experts.moe.ALL_EXPERTS_FUNCTIONS["grouped_mm"] is not before["grouped_mm"]
    assert dict(experts.moe.ALL_EXPERTS_FUNCTIONS) == before
