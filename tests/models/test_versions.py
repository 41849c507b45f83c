"""Versions of Transformers that changed what is hooked into are refused, with their version and what is missing."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from small_models import make  # noqa: E402

from dsa_tvm.errors import ModelError  # noqa: E402
from dsa_tvm.models import families  # noqa: E402
from dsa_tvm.models import transformers as door  # noqa: E402

DEEPSEEK, GLM = families.FAMILIES
TESTED = rf"transformers {transformers.__version__}: .* tested with {families.TESTED[0]} to {families.TESTED[1]}"


def test_what_is_needed_is_there():
    for family in families.FAMILIES:
        families.check_family(family)
    families.check_agreement()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.delattr(DEEPSEEK.module, "apply_rotary_pos_emb"), "no apply_rotary_pos_emb in"),
        (lambda m: m.delattr(DEEPSEEK.module, "DeepseekV32Indexer"), "no DeepseekV32Indexer in"),
        (lambda m: m.delattr(DEEPSEEK.attention, "expand_kv"), "DeepseekV32Attention without expand_kv"),
        (
            lambda m: m.setattr(DEEPSEEK.attention, "expand_kv", lambda self, latent: 0),
            r"lacking \['k_rot', 'kv_nope'\]",
        ),
        (
            lambda m: m.setattr(
                DEEPSEEK.indexer,
                "forward",
                lambda self, hidden_states, q_resid, position_embeddings, attention_mask, position_ids, pages: 0,
            ),
            r"new \['pages'\]",
        ),
    ],
    ids=range(5),
)
def test_a_change_of_names(change, message, monkeypatch):
    change(monkeypatch)
    with pytest.raises(ModelError, match=TESTED) as error:
        families.check_family(DEEPSEEK)
    assert re.search(message, str(error.value))


def test_no_such_family():
    with pytest.raises(ModelError, match="no models of type deepseek_v99"):
        families.check_family(families.Family("deepseek_v99", "DeepseekV99", "apply_rotary_pos_emb"))


def test_a_change_of_meaning(monkeypatch):
    """Names as they were, but what the indexer computes is another thing: the small model tells."""
    right = door.select
    monkeypatch.setattr(
        door, "select", lambda indexer, rotate, hidden, *args: right(indexer, rotate, hidden.flip(-1), *args)
    )
    with pytest.raises(ModelError, match="computes something else than its eager attention") as error:
        families.check_agreement()
    assert re.search(TESTED, str(error.value))


def test_a_module_that_lacks_something():
    model = make("deepseek", num_hidden_layers=1)
    del model.model.layers[0].self_attn.indexer.softmax_scale
    with pytest.raises(ModelError, match=r"DeepseekV32Attention without indexer\.softmax_scale"):
        door.accelerate(model)


UNTESTED = """
import sys
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as m
sys.modules["transformers"].__version__ = "99.1.0"
{change}
import dsa_tvm.models.transformers
print("imported")
"""


@pytest.mark.parametrize("changed", [False, True])
def test_a_version_that_nobody_tested(changed):
    """It is compared with eager attention when the module is imported, and refused if it computes something else."""
    change = (
        "forward = m.GlmMoeDsaIndexer.forward\n"
        "def other(self, hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache=None):\n"
        "    return forward(self, -hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache)\n"
        "m.GlmMoeDsaIndexer.forward = other\n"
        if changed
        else ""
    )
    code = UNTESTED.format(change=change)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if changed:
        assert done.returncode and "transformers 99.1.0: glm_moe_dsa computes something else" in done.stderr
    else:
        assert done.stdout.strip() == "imported", done.stderr
