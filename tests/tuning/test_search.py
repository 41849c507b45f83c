"""The search over a kernel's decisions."""

from __future__ import annotations

import math
import random
from dataclasses import asdict

import numpy as np
import pytest
from dsa_tvm.schedules import CPU, space

from dsa_tvm.tuning.search import Search

TARGET = "x86-64-v3"

BEST = {
    "lightning_indexer": {"tile_keys": 8, "heads": 8, "block_keys": 96, "in_place": 1, "unroll_d": 2, "rows": 2},
    "topk": {"slack": 512, "scan": 16, "sample": 256},
    "sparse_mla": {"block_keys": 96, "tile_keys": 8, "heads": 8, "tile_heads": 8, "values": 32, "task_heads": 32},
}


def worth(best, decisions):
    """A made-up speed that decreases with the distance from `best`."""
    return 2 ** (-0.2 * sum(abs(math.log2((decisions[n] + 1) / (v + 1))) for n, v in best.items()))


def searched(op, trials, seed, guided=True):
    search = Search(op, CPU[op], TARGET, seed=seed, batch=8)
    default = asdict(CPU[op].DEFAULT[TARGET])
    base = worth(BEST[op], default)
    search.tell([(default, 1.0)])
    lot, seen = random.Random(seed), [default]
    while len(seen) < trials:
        told = [(d, worth(BEST[op], d) / base) for d in search.ask()]
        seen += [d for d, _ in told]
        # Unguided: the answers are shuffled, so that nothing can be learned from them.
        search.tell(told if guided else [(d, lot.random()) for d, _ in told])
    return seen, [worth(BEST[op], d) / base for d in seen]


@pytest.mark.parametrize("op", CPU)
def test_proposals_are_new_and_legal(op):
    seen, _ = searched(op, 33, 1)
    assert len({tuple(d.items()) for d in seen}) == len(seen) >= 33
    assert all(space.is_legal(CPU[op], d) for d in seen)


def test_equal_seeds_and_answers_give_equal_proposals():
    """NumPy's global generator has no effect on the proposals, and does not change."""
    found = []
    for global_seed in (1, 2):
        np.random.seed(global_seed)
        found.append(searched("lightning_indexer", 25, 4)[0])
        drawn = np.random.random()
        np.random.seed(global_seed)
        assert drawn == np.random.random()
    assert found[0] == found[1] != searched("lightning_indexer", 25, 5)[0]


def test_learns():
    """The last proposals of a guided search are better than those of a search that learns nonsense."""
    late = {guided: searched("sparse_mla", 65, 2, guided)[1][-16:] for guided in (True, False)}
    mean = {guided: sum(values) / len(values) for guided, values in late.items()}
    assert mean[True] > 1.15 * mean[False]


def test_small_space_ends():
    """A search proposes every combination once, and then nothing."""
    search = Search("topk", CPU["topk"], TARGET, seed=3, batch=8)
    legal, told = search.size, set()
    while batch := search.ask():
        keys = {tuple(d.items()) for d in batch}
        assert not keys & told
        told |= keys
        search.tell([(d, 1.0) for d in batch])
    values = space.values(CPU["topk"], TARGET)
    combinations = [
        {"slack": a, "scan": b, "sample": c} for a in values["slack"] for b in values["scan"] for c in values["sample"]
    ]
    legal = [d for d in combinations if space.is_legal(CPU["topk"], d)]
    assert len(told) > 0.95 * len(legal)


def test_failures_are_avoided():
    """A value that always fails is proposed less and less."""
    op = "lightning_indexer"
    search = Search(op, CPU[op], TARGET, seed=5, batch=8)
    counts = []
    for _ in range(10):
        batch = search.ask()
        counts.append(sum(d["heads"] == 32 for d in batch))
        search.tell([(d, None if d["heads"] == 32 else 1.0 + d["unroll_d"] / 32) for d in batch])
    assert sum(counts[5:]) < sum(counts[:5])


def test_replay_by_value():
    """Sampled decisions can be replayed by value, and decisions of another version are recognised."""
    import tvm

    for op, module in CPU.items():
        values = space.values(module, TARGET)
        schedule = tvm.s_tir.Schedule(space.stand_in(op))
        default = asdict(module.DEFAULT[TARGET])
        space.apply(schedule, values, default)
        assert space.decisions_of(schedule.trace, values) == default
        assert space.kernel_decisions(module, default) == module.DEFAULT[TARGET]
        search = Search(op, module, TARGET, seed=1, batch=4)
        assert search.covers(default)
        assert not search.covers({**default, "new": 1})
        with pytest.raises(ValueError, match="expected"):
            space.kernel_decisions(module, {"new": 1})
