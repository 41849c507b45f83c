"""Which decisions a library contains, and which of them a call gets."""

from __future__ import annotations

import random

import pytest
from tuning_records import LENGTHS, make

from dsa_tvm.errors import ArgumentError
from dsa_tvm.records.selection.cpu import BUCKETS, WORTH, Row, by_size, choices, choose, explain
from dsa_tvm.spec import INT32_MAX

DEFAULT = {"slack": 2048, "scan": 64}


def variant(n):
    return {"slack": n, "scan": 64}


def final(bucket, n, speedup, op="topk", **changes):
    """A final of `variant(n)`. `speedup` is one number for all thread counts, or one for each."""
    speedups = speedup if isinstance(speedup, tuple) else (speedup, speedup)
    return make(op, bucket, speedups, kind="final", **{"decisions": variant(n)} | changes)


def everywhere(n, speedup, op="topk"):
    return [final((s_q, s_kv), n, speedup, op) for s_q, row in BUCKETS[op].items() for s_kv in row]


def lookup(rows, s_q, s_kv):
    return next(row.decisions for row in rows if s_q <= row.s_q_max and s_kv <= row.s_kv_max)


def chosen(records, op="topk"):
    """The chosen slack of each bucket."""
    rows = choose(op, records, DEFAULT, LENGTHS)
    return {(s_q, s_kv): lookup(rows, s_q, s_kv)["slack"] for s_q, row in BUCKETS[op].items() for s_kv in row}


def others(records):
    """The buckets whose choice is not DEFAULT."""
    return {bucket: slack for bucket, slack in chosen(records).items() if slack != 2048}


@pytest.mark.parametrize("op", BUCKETS)
def test_calls_go_to_the_nearest_bucket(op):
    buckets = [(s_q, s_kv) for s_q, row in BUCKETS[op].items() for s_kv in row]
    # The decisions of a bucket are its number.
    records = [final(bucket, n, 2.0, op) for n, bucket in enumerate(buckets)]
    rows = choose(op, records, DEFAULT, LENGTHS)
    assert len(rows) == len(buckets)

    def nearest(length, sizes):
        # Nearest by ratio. The geometric mean belongs to the smaller size.
        return min(sizes, key=lambda size: (max(length / size, size / length), size))

    edges = {(a * b) ** 0.5 for a in (1, 16, 128, 2048, 4096, 32768, 131072) for b in (1, 16, 128, 2048, 4096, 32768)}
    lengths = sorted({int(edge) + step for edge in edges for step in (-1, 0, 1, 2)} - {-1, 0} | {10**6, INT32_MAX})
    for s_q in lengths:
        row = nearest(s_q, BUCKETS[op])
        for s_kv in lengths:
            bucket = (row, nearest(s_kv, BUCKETS[op][row]))
            assert lookup(rows, s_q, s_kv)["slack"] == buckets.index(bucket), (s_q, s_kv)
    assert lookup(rows, 0, 0) == lookup(rows, 1, 1)


def test_bounds():
    rows = choose("topk", [final((1, 4096), 7, 2.0), final((16, 32768), 8, 2.0)], DEFAULT, LENGTHS)
    assert rows == [
        Row(4, 11585, variant(7)),
        Row(4, INT32_MAX, DEFAULT),
        Row(INT32_MAX, 11585, DEFAULT),
        Row(INT32_MAX, 65536, variant(8)),
        Row(INT32_MAX, INT32_MAX, DEFAULT),
    ]


@pytest.mark.parametrize("op", BUCKETS)
def test_without_records_there_is_one_row(op):
    assert choose(op, [], DEFAULT, LENGTHS) == [Row(INT32_MAX, INT32_MAX, DEFAULT)]
    assert choose(op, everywhere(5, 1.5, op), DEFAULT, LENGTHS) == [Row(INT32_MAX, INT32_MAX, variant(5))]


def test_equal_groups_are_one():
    records = [final((s_q, 4096), 7, 2.0) for s_q in (1, 16)]
    rows = choose("topk", records, DEFAULT, LENGTHS)
    assert rows == [Row(INT32_MAX, 11585, variant(7)), Row(INT32_MAX, INT32_MAX, DEFAULT)]


def test_three_percent():
    assert not others([final((1, 4096), 7, 1.029)])
    assert others([final((1, 4096), 7, 1.031)]) == {(1, 4096): 7}


def test_a_kernel_that_is_there_is_used_where_it_gains_little():
    records = [final((1, 4096), 7, 1.2), final((1, 32768), 7, 1.01), final((16, 4096), 7, 0.995)]
    assert others(records) == {(1, 4096): 7, (1, 32768): 7}


def test_the_largest_total_gain_first():
    """A specialist of a bucket that is only a little better than one for all buckets is not worth a kernel."""
    records = [*everywhere(50, 1.2), final((1, 4096), 1, 1.22), final((16, 4096), 2, 1.23)]
    assert set(chosen(records).values()) == {50}
    records[-1] = final((16, 4096), 2, 1.25)
    assert chosen(records) == dict.fromkeys(chosen(records), 50) | {(16, 4096): 2}


def test_gain_is_what_the_others_do_not_bring():
    """The second of two good all-rounders gains nothing once the first is chosen."""
    records = everywhere(1, 1.5) + everywhere(2, 1.49) + [final((1, 4096), 3, 1.6)]
    assert set(chosen(records).values()) == {1, 3}


def test_a_loss_elsewhere_is_no_loss():
    """Of several specialists the best one is taken. Other buckets do not change."""
    general = everywhere(1, 1.2)
    good, better = final((1, 4096), 2, 1.37), [r for r in everywhere(3, 1.0) if r.shape["s_kv"] != 4096]
    assert chosen([*general, good, *better, final((1, 4096), 3, 1.4)])[1, 4096] == 3


def test_default_is_as_fast_as_itself():
    """DEFAULT is never chosen as a record, whatever its final says."""
    assert others([final((1, 4096), 2048, 1.5), final((1, 4096), 7, 1.4)]) == {(1, 4096): 7}


def test_the_order_of_the_records_does_not_matter():
    twins = [final((1, 4096), 7, 1.5), final((1, 4096), 8, 1.5)]
    assert choose("topk", twins, DEFAULT, LENGTHS) == choose("topk", twins[::-1], DEFAULT, LENGTHS)


def test_slower_with_some_number_of_threads():
    assert not others([final((1, 4096), 7, (2.0, 0.98))])
    assert others([final((1, 4096), 7, (2.0, 0.995))]) == {(1, 4096): 7}
    # In another bucket, the same decisions count with what was measured there.
    assert others([final((1, 4096), 7, (2.0, 0.98)), final((16, 4096), 7, 2.0)]) == {(16, 4096): 7}


def test_the_latest_counts():
    early = final((1, 4096), 7, 2.0)
    late = final((1, 4096), 7, 0.5, date="2027-01-01T00:00:00Z")
    assert not others([early, late]) and not others([late, early])
    assert not others([early, final((1, 4096), 7, 0.5)]), "of equal dates the last one counts"


def test_other_sizes_count_for_the_bucket_that_serves_them():
    assert others([final((1, 5000), 2, 2.0)]) == {(1, 4096): 2}
    assert others([final((7, 10**6), 2, 2.0)]) == {(16, 131072): 2}


def test_what_does_not_count():
    odd = {"s_q": 1, "s_kv": 4096, "topk": 512}
    records = [
        make(bucket=(1, 4096), speedups=(2.0, 2.0), decisions=variant(1)),
        final((1, 4096), 3, 2.0, shape=odd),
        final((1, 4096), 4, 2.0, seconds={}, error="wrong result"),
        final((1, 4096), 5, 2.0, decisions={"slack": 5, "gone": 1}),
        final((1, 32768), 6, 2.0, op="sparse_mla"),
    ]
    assert not others(records)
    assert choose("topk", records, DEFAULT, LENGTHS | {"topk": 512})[0].decisions == variant(3)


@pytest.mark.parametrize("seed", range(20))
def test_rules_hold_for_any_records(seed):
    rng = random.Random(seed)
    buckets = [(s_q, s_kv) for s_q, row in BUCKETS["topk"].items() for s_kv in row]
    records = [
        final(b, n, (rng.uniform(0.9, 1.3), rng.uniform(0.9, 1.3)))
        for b in buckets
        for n in range(8)
        if rng.random() < 0.7
    ]
    rng.shuffle(records)
    got = choices("topk", records, DEFAULT, LENGTHS)
    held = {c.record.decisions["slack"] for c in got if c.record}
    usable = {
        b: [r for r in records if (r.shape["s_q"], r.shape["s_kv"]) == b and min(r.speedups.values()) > 0.9901]
        for b in buckets
    }
    for choice in got:
        there = usable[choice.s_q, choice.s_kv]
        best = max([1.0, *(r.speedup for r in there if r.decisions["slack"] in held)])
        assert (choice.record.speedup if choice.record else 1.0) == best
        assert all(r.speedup < best * (1 + WORTH) for r in there)
    rows = choose("topk", records, DEFAULT, LENGTHS)
    for choice in got:
        expected = choice.record.decisions if choice.record else DEFAULT
        assert lookup(rows, choice.s_q_max, choice.s_kv_max) == expected
        assert lookup(rows, choice.s_q, choice.s_kv) == expected
    rng.shuffle(records)
    assert choose("topk", records, DEFAULT, LENGTHS) == rows


def test_refusals():
    with pytest.raises(ArgumentError, match="op: expected one of lightning_indexer, topk, sparse_mla, got 'softmax'"):
        choose("softmax", [], DEFAULT, LENGTHS)
    with pytest.raises(ArgumentError, match="topk: lengths: expected topk, got"):
        choose("topk", [], DEFAULT, {"d_v": 512})
    mixed = [final((1, 4096), 7, 2.0), final((1, 4096), 7, 2.0, target="aarch64")]
    with pytest.raises(ArgumentError, match="records: expected one target and choice of element types"):
        choose("topk", mixed, DEFAULT, LENGTHS)


def test_finals_keep_one_of_each():
    records = [final((1, 4096), 7, 2.0), final((1, 4096), 7, 1.5), final((1, 4096), 8, 1.1)]
    found = by_size("topk", records, LENGTHS)
    assert list(found) == [(s_q, s_kv) for s_q, row in BUCKETS["topk"].items() for s_kv in row]
    assert found[1, 4096] == records[1:]


def test_explain():
    records = [
        final((1, 4096), 7, 1.5),
        final((1, 4096), 8, 1.52),
        final((1, 32768), 7, 0.995),
        final((1, 131072), 7, (2.0, 0.5)),
        final((16, 4096), 9, 1.02),
    ]
    assert explain("topk", records, LENGTHS, DEFAULT) == [
        "topk 1 x 4096 (to 4 x 11585): scan=64 slack=8; 1.520 times as fast as DEFAULT",
        "topk 1 x 32768 (to 4 x 65536): DEFAULT; none of 1 finals there is faster",
        "topk 1 x 131072 (to 4 x any): DEFAULT; none of 1 finals there has these parameters and is nowhere slower",
        "topk 16 x 4096 (to any x 11585): DEFAULT; "
        "the fastest final there is 1.020 times as fast, which is not worth a kernel",
        "topk 16 x 32768 (to any x 65536): DEFAULT; nothing was measured there",
        "topk 16 x 131072 (to any x any): DEFAULT; nothing was measured there",
    ]
    records = [*everywhere(1, 1.5), final((1, 4096), 2, 1.52)]
    assert explain("topk", records, LENGTHS)[0].endswith("DEFAULT (1.520 would need one more kernel)")
