"""MetaSchedule's evolutionary search with an XGBoost cost model over the decisions of one kernel.

This adds two things that MetaSchedule lacks for such a space: a mutator for categorical decisions, and a feature
extractor that gives the cost model the decisions themselves. The scheduled stand-in has no loops to extract features
from.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir import Schedule
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.feature_extractor import PyFeatureExtractor
from tvm.s_tir.meta_schedule.mutator import PyMutator
from tvm.s_tir.meta_schedule.postproc import PyPostproc

from ..schedules import space

Decisions = Mapping[str, int]

#: Trials before the predictions of the cost model count.
_WARMUP = 12
#: The speedup that stands for a failed candidate. The cost model weighs examples by their speed, so it would learn
#: nothing from MetaSchedule's usual 1e10 seconds.
_FAILED_SPEEDUP = 0.25


class Search:
    """Proposes decisions, and learns from their measured speedups.

    Parameters
    ----------
    op : str
        Name of the workload.
    module : module
        Kernel module, with Decisions, DEFAULT and choices.
    target : str
    seed : int
        Equal seeds and equal measurements give equal proposals.
    batch : int
        Proposals at a time.
    """

    def __init__(self, op: str, module: space.Module, target: str, *, seed: int, batch: int) -> None:
        self._module, self._choices = module, space.values(module, target)
        self._random = random.Random(seed)
        self._batch = batch
        self._told: set[tuple[int, ...]] = set()
        # MetaSchedule's own candidates, until it is told what they are worth.
        self._asked: dict[tuple[int, ...], ms.MeasureCandidate] = {}
        self._workload = space.stand_in(op)
        self._target = tvm.target.Target({"kind": "llvm", "num-cores": 1})
        self._database = ms.database.MemoryDatabase()
        self._committed = self._database.commit_workload(self._workload)
        self._arguments = ms.arg_info.ArgInfo.from_entry_func(self._workload)
        self._model = ms.cost_model.XGBModel(
            extractor=_Features(self._choices), num_warmup_samples=_WARMUP, num_tuning_cores=1
        )
        generator = ms.space_generator.ScheduleFn(
            lambda sch: space.apply(sch, self._choices),
            sch_rules=[],
            postprocs=[_Legal(module, self._choices)],
            mutator_probs={_Mutate(self._choices, self._random): 1.0},
        )
        strategy = ms.search_strategy.EvolutionarySearch(
            population_size=64, init_measured_ratio=0.25, init_min_unmeasured=2 * batch, eps_greedy=0.1
        )
        with _without_tensor_intrinsics():
            self._context = ms.TuneContext(
                self._workload,
                target=self._target,
                space_generator=generator,
                search_strategy=strategy,
                rand_state=1 + seed % (2**31 - 2),
                num_threads=1,
                logger=_silent(),
            )
        # The search itself never ends. The caller decides on the number of trials.
        self._context.pre_tuning(2**30, batch, database=self._database, cost_model=self._model)

    @property
    def size(self) -> int:
        """The number of combinations of choices, including those that the factory refuses."""
        return math.prod(len(values) for values in self._choices.values())

    def covers(self, decisions: Decisions) -> bool:
        """Whether the space holds these decisions. It may lack those of a record from an older version."""
        names = set(decisions) == set(self._choices)
        return names and all(decisions[n] in values for n, values in self._choices.items())

    def ask(self) -> list[dict[str, int]]:
        """Up to a batch of decisions that were neither told nor skipped; none when the space is exhausted."""
        proposals: list[dict[str, int]] = []
        with _numpy_seeded(self._random.getrandbits(32)):
            candidates = self._context.generate_measure_candidates() or []
        for candidate in candidates:
            decisions = space.decisions_of(candidate.sch.trace, self._choices)
            self._asked[self._key(decisions)] = candidate
            self._keep(proposals, decisions)
        # Near the end of a small space the evolution returns known decisions. The rest are drawn at random.
        for _ in range(200 * self._batch):
            if len(proposals) >= self._batch:
                break
            self._keep(proposals, {n: self._random.choice(values) for n, values in self._choices.items()})
        return proposals

    def tell(self, trials: list[tuple[Decisions, float | None]]) -> None:
        """Learn from measurements.

        Parameters
        ----------
        trials : list of (decisions, speedup)
            Speedup over the default decisions, measured in the same run; None for a candidate that failed.
        """
        candidates, results = [], []
        for decisions, speedup in trials:
            self._told.add(self._key(decisions))
            candidate = self._asked.pop(self._key(decisions), None) or self._candidate(decisions)
            # Relative times, because absolute ones of other minutes or other machines cannot be compared.
            seconds = 1 / (speedup or _FAILED_SPEEDUP)
            candidates.append(candidate)
            results.append(ms.runner.RunnerResult([seconds], None))
            record = ms.database.TuningRecord(
                candidate.sch.trace, self._committed, [seconds], self._target, self._arguments
            )
            self._database.commit_tuning_record(record)
        if candidates:
            self._context.notify_runner_results(candidates, results)
            self._model.update(self._context, candidates, results)

    def skip(self, decisions: Decisions) -> None:
        """Do not propose these decisions. Their speedup is not known yet."""
        self._told.add(self._key(decisions))

    def _candidate(self, decisions: Decisions) -> ms.MeasureCandidate:
        """Decisions that MetaSchedule did not propose as a candidate; its database takes nothing else."""
        schedule = Schedule(self._workload)
        space.apply(schedule, self._choices, decisions)
        return ms.MeasureCandidate(schedule, self._arguments)

    def _key(self, decisions: Decisions) -> tuple[int, ...]:
        return tuple(decisions[name] for name in self._choices)

    def _keep(self, proposals: list[dict[str, int]], decisions: dict[str, int]) -> None:
        if self._key(decisions) in self._told or decisions in proposals:
            return
        if space.is_legal(self._module, decisions) and len(proposals) < self._batch:
            proposals.append(decisions)


@derived_object
class _Mutate(PyMutator):
    """Changes one decision of a trace to another value, mostly a neighbouring one because lengths are ordered."""

    def __init__(self, choices: Mapping[str, tuple[int, ...]], lot: random.Random) -> None:
        super().__init__()
        self.choices, self.lot = choices, lot

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, trace: Any, _: Any = None) -> Any:
        instructions = space.samples(trace)
        free = [i for i, values in enumerate(self.choices.values()) if len(values) > 1]
        picked = self.lot.choice(free)
        count = len(list(self.choices.values())[picked])
        now = int(trace.decisions[instructions[picked]])
        near = [i for i in (now - 1, now + 1) if 0 <= i < count]
        far = [i for i in range(count) if i != now]
        return trace.with_decision(
            instructions[picked], self.lot.choice(near if self.lot.random() < 0.7 else far), remove_postproc=True
        )

    def clone(self) -> _Mutate:
        return _Mutate(self.choices, self.lot)


@derived_object
class _Legal(PyPostproc):
    """Drops candidates that the kernel factory would refuse."""

    def __init__(self, module: space.Module, choices: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.module, self.choices = module, choices

    def _initialize_with_tune_context(self, context: ms.TuneContext) -> None:
        pass

    def apply(self, sch: Schedule) -> bool:
        return space.is_legal(self.module, space.decisions_of(sch.trace, self.choices))

    def clone(self) -> _Legal:
        return _Legal(self.module, self.choices)


@derived_object
class _Features(PyFeatureExtractor):
    """The features of a candidate: the logarithms of its decisions, and of the products of any two.

    A product tells how much registers and caches hold: a tile is keys times heads.
    """

    def __init__(self, choices: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.choices = choices

    def extract_from(self, context: ms.TuneContext, candidates: list[ms.MeasureCandidate]) -> list[Any]:
        rows = []
        for candidate in candidates:
            logs = np.log2([1.0 + v for v in space.decisions_of(candidate.sch.trace, self.choices).values()])
            pairs = [logs[i] + logs[j] for i in range(len(logs)) for j in range(i)]
            rows.append(tvm.runtime.tensor(np.array([[*logs, *pairs]], np.float32)))
        return rows


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, from which MetaSchedule's cost model draws its scores during the warm-up."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


@contextlib.contextmanager
def _without_tensor_intrinsics() -> Iterator[None]:
    """Keep `TuneContext` from importing TVM's tensor intrinsics, which takes a minute and which no CPU kernel uses."""
    name = "tvm.s_tir.tensor_intrin"
    if name in sys.modules:
        yield
        return
    sys.modules[name] = ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


def _silent() -> logging.Logger:
    logger = logging.getLogger("dsa_tvm.tuning.search")
    logger.setLevel(logging.CRITICAL)
    logging.getLogger("tvm.s_tir.meta_schedule.cost_model.xgb_model").setLevel(logging.ERROR)
    return logger
