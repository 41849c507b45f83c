"""Which records decide on a CPU kernel, depending on its element types."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from tuning_records import make

from dsa_tvm import presets

pytest.importorskip("tvm", reason="kernel factories need apache-tvm")

TARGET, BUCKET = "x86-64-v3", (16, 32768)
F32, BF16, F16, PACKED = ("float32",), ("bfloat16",), ("float16",), ("bfloat16", "float8_e4m3fn")
#: Two sets of decisions for the attention, both different from DEFAULT.
FEW, MANY = {"block_keys": 72}, {"block_keys": 96}


def decisions(changed):
    from dsa_tvm.schedules import CPU

    return asdict(CPU["sparse_mla"].DEFAULT[TARGET]) | changed


def final(types, changed, **changes):
    changes = {"kind": "final", "target": TARGET, "types": types, "decisions": decisions(changed)} | changes
    return make("sparse_mla", BUCKET, **changes)


def planned(*records, preset="deepseek-v3.2"):
    """The decisions of the bucket by element types, and the lines that the build prints."""
    from dsa_tvm.build import plan

    said = []
    rows_of = plan.make([TARGET], records, presets.get(preset), said.append)[TARGET]["sparse_mla"]
    found = {
        types: next(r for r in rows if BUCKET[0] <= r.s_q_max and BUCKET[1] <= r.s_kv_max).decisions
        for types, rows in rows_of.items()
    }
    assert list(found) == [F32, BF16, F16, PACKED]
    return [next(c for c in ({}, FEW, MANY) if found[types] == decisions(c)) for types in found], said


def test_what_was_measured_in_one_type_serves_others_aloud():
    found, said = planned(final(F32, MANY))
    assert found == [MANY] * 4
    assert said == [
        f"sparse_mla on {TARGET}: decisions tuned for float32 serve bfloat16, float16, bfloat16/float8_e4m3fn too, "
        "which have no records"
    ]


def test_records_of_a_type_decide_for_it():
    found, said = planned(final(F32, MANY), final(BF16, FEW), final(F16, FEW))
    # Packed rows become bfloat16 before they are multiplied.
    assert found == [MANY, FEW, FEW, FEW]
    assert said == [
        f"sparse_mla on {TARGET}: decisions tuned for bfloat16 serve bfloat16/float8_e4m3fn too, which have no records"
    ]


@pytest.mark.parametrize(
    "changes", [{"speedups": (0.9, 0.9)}, {"error": "wrong", "seconds": {}}, {"decisions": {"wide": 1}}]
)
def test_what_does_not_hold_in_a_type_is_not_taken_from_another(changes):
    found, _ = planned(final(F32, MANY), final(BF16, MANY, **changes))
    assert found == [MANY, {}, MANY, {}]


def test_records_of_another_type_alone():
    found, said = planned(final(BF16, FEW))
    assert found == [FEW] * 4 and "decisions tuned for bfloat16 serve float32, float16, bf" in said[0]


def test_records_of_another_model_are_none():
    assert planned(final(F32, MANY), final(BF16, FEW), preset="glm-5") == ([{}] * 4, [])


def test_a_table_by_element_types():
    """A row has no entry for other types, whose calls continue to the next row."""
    from dsa_tvm.build import kernel_table, objects, plan

    records = [final(F32, MANY), final(BF16, FEW)]
    rows_of = plan.make([TARGET], records, presets.get("deepseek-v3.2"), lambda line: None)[TARGET]["sparse_mla"]
    shared = objects.shared(rows_of)
    assert [types for _, types in shared] == [[F32, F16], [BF16, PACKED]]
    rows = [
        kernel_table.Kernels(row.s_q_max, row.s_kv_max, objects.CPU["sparse_mla"].Decisions(**row.decisions), symbols)
        for rows, types in shared
        for symbols in [{t: "_".join(t) for t in types}]
        for row in rows
    ]
    text = kernel_table.source([(TARGET, {"sparse_mla": rows})])
    cells = text.split("static const struct mla_kernel mla_0[] = {")[1].split("};")[0].split("  {.s_q")[1:]
    assert len(cells) == len(rows) == sum(len(own) for own, _ in shared)
    assert [".last = 1" in cell for cell in cells] == [False] * (len(rows) - 1) + [True]
    first = len(shared[0][0])
    assert all("[DTYPE_FLOAT32]" in cell and "[DTYPE_BFLOAT16]" not in cell for cell in cells[:first])
    assert all("[DTYPE_BFLOAT16]" in cell and "[DTYPE_FLOAT32]" not in cell for cell in cells[first:])


def test_what_was_tuned_for_float32_decides_nothing_of_bf16_products():
    """These are of a target of their own, though that has its other kernels from the one that was tuned."""
    from dsa_tvm.schedules import CPU

    from dsa_tvm.build import plan

    target, types = "x86-64-v4-bf16", ("bfloat16",) * 2
    default = asdict(CPU["lightning_indexer"].DEFAULT[target])
    tuned = default | {"rows": 2 * default["rows"]}
    of_float = make("lightning_indexer", BUCKET, kind="final", target="x86-64-v4", decisions=tuned)
    of_bf16 = make("lightning_indexer", BUCKET, kind="final", target=target, types=types, decisions=tuned)
    for records, expected in (([of_float], default), ([of_float, of_bf16], tuned)):
        rows_of = plan.make([target], records, presets.get("deepseek-v3.2"), lambda line: None)[target]
        rows = rows_of["lightning_indexer"][types]
        row = next(r for r in rows if BUCKET[0] <= r.s_q_max and BUCKET[1] <= r.s_kv_max)
        assert row.decisions == expected


def test_decisions_that_bf16_products_cannot_have_are_left_out():
    """A log may hold them; a build that took them would fail."""
    from dsa_tvm.schedules import CPU

    from dsa_tvm.build import plan

    target = "x86-64-v4-bf16"
    odd = asdict(CPU["sparse_mla"].DEFAULT[target]) | {"heads": 8, "tile_heads": 8}
    said = []
    record = make("sparse_mla", BUCKET, kind="final", target=target, types=BF16, decisions=odd)
    rows_of = plan.make([target], [record], presets.get("deepseek-v3.2"), said.append)[target]["sparse_mla"]
    assert all(row.decisions != odd for rows in rows_of.values() for row in rows)
    assert "leaving out a record of sparse_mla on x86-64-v4-bf16" in said[0] and "bf16 dot products" in said[0]
