"""``dsa-tvm demo``: a small model writes tokens, and attention of DeepSeek-V3.2's size reads a text.

Both run in ONNX Runtime and are timed beside standard operators. The tokens are compared with those of Transformers,
the attention with a float64 reference.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import functions, presets
from ..errors import ArgumentError
from ..ops import OPS
from ..presets import Preset
from ..runtime import library, machine
from ..spec import INT32_MAX
from ..terminal.extras import expect_installed
from ..terminal.progress import Progress
from ..terminal.text import digits, duration, table
from . import check, clock, prompt, sample_model, workload
from .peers import Skipped
from .peers.cpu import check_bytes, check_memory, dense_model, onnxruntime_errors, session
from .workload import Workload

CHUNK = 128
STEPS = 16
_DENSE_QUERIES = 8
_TOKENS = 32768
#: Peak memory without the part that grows with the text: imports, queries, their outputs and float64 checks.
_OTHER_BYTES = 180 << 20
_SPEC = OPS["dsa_attention"]


@dataclass
class _Stage:
    """One row of the table."""

    name: str
    feeds: list[dict[str, np.ndarray]]  # of each call
    repeats: int
    checked: list[int]  # calls whose sampled queries are checked
    outputs: list[list[np.ndarray]] = field(default_factory=list)
    finding: check.Finding = field(default_factory=check.Finding)
    seconds: dict[str, float] = field(default_factory=dict)  # a call, by contender

    @property
    def queries(self) -> int:
        return len(self.feeds[0]["q"])


def run(args: argparse.Namespace) -> None:
    """Run the demo and print its table.

    Parameters
    ----------
    args : argparse.Namespace
        file (Path or None), tokens (int or None) and threads (int, 0 for all), as `dsa_tvm.cli` parses them.

    Raises
    ------
    ArgumentError
        The text or a number is not usable.
    CheckError
        The model writes other tokens than with Transformers, or a result differs from the float64 reference or from
        plain ONNX Runtime by more than the tolerance.
    DsaError
        onnx or onnxruntime is not installed, or refuses the library.
    """
    preset = presets.get(presets.DEFAULT)
    at_least = preset.topk + CHUNK + STEPS
    if args.tokens is not None and args.tokens < at_least:
        raise ArgumentError(f"demo: tokens: expected at least {at_least}, got {args.tokens}")
    if args.threads < 0:
        raise ArgumentError(f"demo: threads: expected 0 for all, or more, got {args.threads}")
    threads = args.threads or machine.usable_cpus()
    machine.check_threads("demo", [threads])
    expect_installed("demo", "onnx", "onnx", "onnxruntime")
    path = args.file or prompt.default_text()
    tokens, notes = _tokens(path, args.tokens, at_least, preset)
    from ..export import build_attention_model, build_model

    attrs: dict[str, Any] = {"topk": preset.topk, "sm_scale": preset.sm_scale, "d_v": preset.d_v}
    began = time.perf_counter()
    disturbed = workload.load_notes()
    with onnxruntime_errors(), Progress(10) as progress:
        written = sample_model.run(threads, progress.step)
        progress.step(f"read {len(tokens)} bytes and embed them")
        inputs = prompt.embed(tokens, CHUNK + STEPS, preset)
        stages = _stages(inputs, len(tokens) - STEPS)
        model = build_attention_model(**attrs)

        ours = session(model, threads, library.get_library_path())
        for stage in stages:
            progress.step(f"{stage.name}: run, and check against float64")
            _run(stage, ours, attrs)

        plain = session(model, threads)
        progress.step("select the keys in plain ONNX Runtime")
        selector = session(build_model("indexer_topk", topk=preset.topk), threads)
        selections = [_selections(stage, selector, preset) for stage in stages]
        del selector
        for stage, selection in zip(stages, selections, strict=True):
            progress.step(f"{stage.name}: compare with plain ONNX Runtime")
            notes += _against_plain(stage, selection, plain, attrs)
        for stage, selection in zip(stages, selections, strict=True):
            progress.step(f"{stage.name}: time ours, plain ONNX Runtime and dense attention in turns")
            contenders = {"ours": (ours, stage.feeds)}
            if selection:
                contenders["plain"] = (plain, stage.feeds)
            notes += _dense(stage, preset, threads, contenders)
            _race(stage, contenders)
    notes += [_affinity(inputs, tokens, preset, stages[0]), *disturbed]
    print(f"{library.active_target()}, threads: {threads}, float32")
    print()
    _report_model(written)
    print()
    print(f"attention over {path}, {len(tokens)} tokens (bytes)")
    _report(stages, len(tokens) - STEPS, preset, notes)
    print(f"all checks passed; {duration(time.perf_counter() - began)} in all")


def _tokens(path: Path, asked: int | None, at_least: int, preset: Preset) -> tuple[np.ndarray, list[str]]:
    """The tokens of the text, as many as fit in memory, and a note if these are fewer than by default.

    Raises
    ------
    ArgumentError
        The text is not usable, or memory holds fewer tokens than are asked for or needed.
    """
    left = machine.memory()
    most = (left.bytes - _OTHER_BYTES) // prompt.size(1, preset)
    if most < at_least:
        needed = machine.in_units(_OTHER_BYTES + prompt.size(at_least, preset))
        raise ArgumentError(f"demo: expected {needed} of memory at least, got {left}")
    wanted = min(_TOKENS if asked is None else asked, INT32_MAX)
    # Read one more than fits, to know whether there are more.
    tokens = prompt.read(path, min(wanted, most + 1), at_least)
    if len(tokens) <= most:
        return tokens, []
    if asked is not None:
        raise ArgumentError(f"demo: tokens: expected at most {most}, which fit into {left}, got {asked}")
    return tokens[:most], [f"tokens: {most} instead of {_TOKENS}, which would not fit into {left}"]


def _report_model(written: sample_model.Run) -> None:
    expected = written.expected
    print("sample model: DeepSeek-V3.2's architecture, small; weights are seeded, not trained")
    for line in table(["phase", "tokens", "time", "tokens/s", "plain ORT takes"], written.cells()):
        print(line)
    print(f"its {len(expected.tokens)} new tokens are those of {expected.made_by}")


def _report(stages: Sequence[_Stage], prefilled: int, preset: Preset, notes: Sequence[str]) -> None:
    for line in table(["stage", "time", "GFLOP/s", "plain ORT", "dense", "error"], [_cells(s, preset) for s in stages]):
        print(line)
    tolerance = _SPEC.tolerance["out"]["float32"]
    print()
    for line in [
        f"sizes: DeepSeek-V3.2: indexer {preset.h_idx} x {preset.d_idx}, topk {preset.topk}, {preset.h_q} heads, "
        f"{preset.d_qk}/{preset.d_v}; weights are seeded, not trained",
        f"prefill: the last {CHUNK} queries of a prompt that is prefilled in chunks, over all {prefilled} "
        "keys so far; the chunks before it are not run",
        f"decode: {STEPS} steps, the cache growing by a row each; times are of the median step",
        f"error: largest of sampled queries against float64; allowed is {tolerance.abs:g} + {tolerance.rel:g} |x|",
        *notes,
    ]:
        print(line)


def _stages(inputs: prompt.Prompt, prefilled: int) -> list[_Stage]:
    chunk = inputs.feeds(prefilled - CHUNK, CHUNK)
    steps = [inputs.feeds(prefilled + i, 1) for i in range(STEPS)]
    return [
        _Stage(f"prefill, {CHUNK} queries", [chunk], repeats=3, checked=[0]),
        _Stage("decode, a token", steps, repeats=1, checked=check.sample(STEPS)),
    ]


def _run(stage: _Stage, ours: Any, attrs: Mapping[str, Any]) -> None:
    stage.outputs = [ours.run(None, feed) for feed in stage.feeds]
    found = []
    for i in stage.checked:
        work = Workload("dsa_attention", stage.feeds[i], attrs, {})
        found.append(check.check(work, stage.outputs[i], check.sample(stage.queries), stage.name))
    stage.finding = check.Finding(
        max(f.error for f in found), max(f.of_allowed for f in found), sum(f.near_ties for f in found)
    )


def _selections(stage: _Stage, selector: Any, preset: Preset) -> list[np.ndarray]:
    """What plain ONNX Runtime selects in each call, or nothing if it would need too much memory."""
    try:
        check_memory(
            "dsa_attention", {**preset.lengths, "s_q": stage.queries, "s_kv": len(stage.feeds[-1]["kv"])}, held=3
        )
    except Skipped:
        return []
    return [selector.run(None, check.indexer_inputs(feed))[0] for feed in stage.feeds]


def _against_plain(stage: _Stage, selections: Sequence[np.ndarray], plain: Any, attrs: Mapping[str, Any]) -> list[str]:
    """Compare every query: the outputs if both selected the same keys, else both selections with float64."""
    if not selections:
        return [f"{stage.name}: plain ONNX Runtime is left out: it needs over 6 GiB, or over 80 % of what is free"]
    where, tolerance = f"{stage.name}: against plain ONNX Runtime", _SPEC.tolerance["out"]["float32"]
    largest, agreed, total = 0.0, 0, 0
    for feed, ours, theirs in zip(stage.feeds, stage.outputs, selections, strict=True):
        indexer = check.indexer_inputs(feed)
        selected = functions.indexer_topk(**indexer, topk=attrs["topk"])
        out = plain.run(["out"], feed)[0]
        largest = max(largest, float(np.abs(ours[0] - out).max()))
        same = (selected == theirs).all(1)
        check.compare(where, ours[0][same], out[same].astype(np.float64), tolerance)
        for indices in (selected, theirs):
            check.check_indices(where, indexer, indices, attrs["topk"], np.flatnonzero(~same).tolist())
        agreed, total = agreed + int(same.sum()), total + len(same)
    others = "" if agreed == total else ", the rest differ by near-ties (checked)"
    return [
        f"{stage.name}: {agreed} of {total} queries select the same keys as plain ONNX Runtime{others}; largest "
        f"difference of the outputs {largest:.1e}"
    ]


def _dense(
    stage: _Stage, preset: Preset, threads: int, contenders: dict[str, tuple[Any, list[dict[str, np.ndarray]]]]
) -> list[str]:
    """Add attention over all keys. A whole prefill chunk of it would take long, so a few queries stand for it."""
    queries = min(stage.queries, _DENSE_QUERIES)
    try:
        check_bytes(3 * 4 * queries * preset.h_q * len(stage.feeds[-1]["kv"]))
    except Skipped as reason:
        return [f"{stage.name}: dense attention is left out, it {reason}"]
    running = session(dense_model(preset.sm_scale, preset.lengths, queries == 1), threads)
    cut = [{"q": f["q"][-queries:], "kv": f["kv"], "ke": f["ke"][-queries:]} for f in stage.feeds]
    contenders["dense"] = (running, cut)
    if queries == stage.queries:
        return []
    scale = f"scaled by {stage.queries} / {queries}"
    return [f"{stage.name}: dense attention is timed on the last {queries} queries and {scale}"]


def _race(stage: _Stage, contenders: Mapping[str, tuple[Any, list[dict[str, np.ndarray]]]]) -> None:
    """The median time of a call of each contender. They take turns after a first call that does not count."""
    for running, feeds in contenders.values():
        running.run(None, feeds[0])

    def timed(running: Any, feeds: list[dict[str, np.ndarray]]) -> Callable[[int], float]:
        def call(turn: int) -> float:
            start = time.perf_counter()
            running.run(None, feeds[turn % len(feeds)])
            return time.perf_counter() - start

        return call

    turns = {name: timed(*contender) for name, contender in contenders.items()}
    taken = list(clock.take_turns(turns, len(stage.feeds) * stage.repeats))
    stage.seconds = {name: statistics.median(times[name] for times in taken) for name in contenders}
    if "dense" in stage.seconds:
        stage.seconds["dense"] *= stage.queries / len(contenders["dense"][1][0]["q"])


def _cells(stage: _Stage, preset: Preset) -> list[str]:
    feed = stage.feeds[len(stage.feeds) // 2]
    ours, found = stage.seconds["ours"], stage.finding
    gflops = workload.flops("dsa_attention", preset.lengths, feed["ks"], feed["ke"]) / ours / 1e9

    def against(name: str) -> str:
        other = stage.seconds.get(name)
        return "-" if other is None else f"{duration(other)} = {digits(other / ours)}x"

    error = f"{found.error:.1e} ({found.of_allowed:.2f} of allowed)"
    return [stage.name, duration(ours), digits(gflops), against("plain"), against("dense"), error]


def _affinity(inputs: prompt.Prompt, tokens: np.ndarray, preset: Preset, stage: _Stage) -> str:
    """How well the selection follows the text."""
    feed = stage.feeds[0]
    indices = functions.indexer_topk(**check.indexer_inputs(feed), topk=preset.topk)
    first = int(feed["ke"][0]) - 1
    asking = tokens[first : first + len(indices), None]
    selected = float((tokens[indices] == asking).mean())
    overall = float((tokens[None, :first] == asking).mean())
    return (
        f"selection: {100 * selected:.0f} % of the selected tokens are the byte that the query stands on, "
        f"{100 * overall:.0f} % of all tokens are"
    )
