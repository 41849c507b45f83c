"""Hostile calls at every door give an error that names the argument, or the defined result, and touch nothing else."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from c_door import Attribute, CDoor, Options, pointers, structure
from compare import assert_close, tolerance_of
from doors import DOORS, Door, Functions, Refused, check_memory, make_door, memories

from dsa_tvm.ops import OPS
from dsa_tvm.runtime import library

from . import Call, Case, cases, valid_call
from .samples import memory_of


@pytest.fixture(scope="module")
def tried() -> Iterator[Counter]:
    """Counts cases by door and expectation, and prints the counts. One thread is enough for such small calls."""
    counter: Counter = Counter()
    library.set_num_threads(1)
    yield counter
    library.set_num_threads(0)
    for (door, expected), number in sorted(counter.items()):
        print(f"\nhostile calls: {door}: {number} expected {expected}", end="")
    print(f"\nhostile calls: {counter.total()} in all")


@pytest.mark.parametrize("door_name", DOORS)
@pytest.mark.parametrize("op", OPS)
def test_hostile(op: str, door_name: str, tried: Counter, record_property: Any) -> None:
    door, spec = make_door(door_name), OPS[op]
    failures, before = [], tried.total()
    for variant in spec.variants:
        for case in cases(spec, variant):
            if not door.can(case, spec):
                continue
            tried[door_name, "an error" if case.names else "a result"] += 1
            problem = attempt(door, case, case.call(spec, variant))
            if problem:
                failures.append(f"{'/'.join(variant.values())} {case.argument}, {case.kind}: {problem}")
    number = tried.total() - before
    record_property("cases", number)
    assert number > 100
    assert not failures, f"{len(failures)} of {number} cases:\n" + "\n".join(failures[:40])


def attempt(door: Door, case: Case, call: Call) -> str:
    """What a door does wrong in a case, or ""."""
    before = memories(call)
    # In advance: an output may be an input itself.
    expected = () if case.names else call.reference()
    try:
        outputs = door.run(call)
    except Refused as refusal:
        message = str(refusal)
        if not case.names:
            return f"expected a result, got the error {message!r}"
        if not any(door.blames(message, call, name) for name in case.names) or case.message not in message:
            return f"expected an error about {' or '.join(case.names)} {case.message}, got {message!r}"
        touched = [name for name, (memory, old) in before.items() if not np.array_equal(memory, old)]
        return f"touched {', '.join(touched)}" if touched else ""
    except Exception as error:
        return f"raised {error!r}"
    if case.names:
        return f"expected an error about {' or '.join(case.names)}, got a result"
    try:
        check_memory(call, before)
        check_result(call, outputs, expected)
        if isinstance(door, Functions):
            for mine, theirs in zip(outputs, door.run(call, allocate=True), strict=True):
                assert bits(mine) == bits(theirs), "another result in outputs of its own"
    except AssertionError as error:
        return str(error)
    return ""


def check_result(call: Call, outputs: list[np.ndarray], references: tuple[np.ndarray, ...]) -> None:
    """Check the outputs against the reference, with the tolerance of the operator."""
    spec, first = call.spec, call.spec.dtype_of(call.spec.inputs[0], call.variant)
    for tensor, actual, expected in zip(spec.outputs, outputs, references, strict=True):
        try:
            assert_close(actual, expected, tolerance_of(spec, tensor.name, first))
        except AssertionError as error:
            raise AssertionError(f"{tensor.name}: {error}") from None


def bits(array: np.ndarray) -> bytes:
    """The bits of an array, so that NaN compares equal."""
    return np.ascontiguousarray(array).tobytes()


def test_generic_call_refuses_what_is_no_call() -> None:
    door = CDoor(typed=False)
    spec = OPS["topk"]
    call = valid_call(spec, {})
    inputs = pointers([structure(x) for x in call.inputs.values()])
    outputs = pointers([structure(x) for x in call.outputs.values()])
    attrs = (Attribute * 1)(Attribute(i=5))
    valid = [b"topk", inputs, 3, attrs, 1, outputs, 1, ctypes.byref(Options(8, 0))]
    hostile: list[tuple[int, Any, str]] = [
        (0, name, "op: expected ") for name in (None, b"", b"top", b"x" * 5000, b"%s%n")
    ]
    hostile += [(i, None, "topk: expected arrays") for i in (1, 3, 5)]
    hostile += [(i, n, "topk: expected 3 inputs") for i in (2, 4, 6) for n in (0, 2, 4, -1, 2**31 - 1, -(2**31))]
    before = memory_of(call.tensor("indices").array).copy()
    for function in (door.library.dsa_tvm_call, door.library.dsa_tvm_output_shapes):
        for position, value, message in hostile:
            arguments = [*valid]
            arguments[position] = value
            if function is door.library.dsa_tvm_output_shapes:
                shapes = (ctypes.c_int64 * 3)()
                arguments = [*arguments[:5], None if arguments[5] is None else shapes, arguments[6]]
            assert function(*arguments) == 1, (position, value)
            assert door.library.dsa_tvm_last_error().decode().startswith(message), (position, value)
    assert np.array_equal(before, memory_of(call.tensor("indices").array))
    assert door.library.dsa_tvm_call(*valid[:7], None) == 0


def test_plans_refuse_what_is_no_call() -> None:
    """A plan that is empty, or that a failure has left empty, computes nothing."""
    library, call = CDoor(typed=False).library, valid_call(OPS["topk"], {})
    library.dsa_tvm_plan_create.restype = ctypes.c_void_p
    plan, shapes, size = ctypes.c_void_p(library.dsa_tvm_plan_create()), (ctypes.c_int64 * 3)(), ctypes.c_uint64()
    outputs = pointers([structure(x) for x in call.outputs.values()])
    valid = [
        *(plan, b"topk", pointers([structure(x) for x in call.inputs.values()]), 3),
        *((Attribute * 1)(Attribute(i=5)), 1, shapes, 1, ctypes.byref(size)),
    ]
    hostile: list[tuple[int, Any, str]] = [
        (0, None, "plan: expected one to fill"),
        (1, b"top", "op: expected the name"),
        *((i, None, "topk: expected arrays") for i in (2, 4, 6)),
        *((i, n, "topk: expected 3 inputs") for i in (3, 5, 7) for n in (0, 2, 4, -1, 2**31 - 1)),
        (8, None, "workspace_size: expected an address"),
    ]

    def run(*arguments: Any) -> tuple[int, str]:
        return library.dsa_tvm_run(*arguments), library.dsa_tvm_last_error().decode()

    assert run(plan, outputs, 1, None) == (1, "plan: expected one that dsa_tvm_prepare has filled, got an empty one")
    for position, value, message in hostile:
        assert library.dsa_tvm_prepare(*valid) == 0
        arguments = [*valid]
        arguments[position] = value
        assert library.dsa_tvm_prepare(*arguments) == 1, (position, value)
        assert library.dsa_tvm_last_error().decode().startswith(message), (position, value)
        assert (run(plan, outputs, 1, None)[0] == 0) is (position == 0), "the call of before is still there"
    assert library.dsa_tvm_prepare(*valid) == 0
    for n in (0, 2, -1, 2**31 - 1):
        assert run(plan, outputs, n, None) == (1, f"topk: expected 1 outputs, got {n}")
    assert run(None, outputs, 1, None) == (1, "plan: expected one that dsa_tvm_prepare has filled, got a null pointer")
    assert run(plan, None, 1, None) == (1, "topk: expected an array of outputs, got a null pointer")
    assert run(plan, (ctypes.c_void_p * 1)(), 1, None) == (1, "topk: indices: expected a tensor, got a null pointer")
    assert run(plan, outputs, 1, ctypes.byref(Options(7, 0)))[1].startswith("topk: options: expected size")
    assert run(plan, outputs, 1, ctypes.byref(Options(8, -1)))[1].startswith("topk: num_threads: expected")
    assert run(plan, outputs, 1, None)[0] == run(plan, outputs, 1, None)[0] == 0
    library.dsa_tvm_plan_destroy(plan)
    library.dsa_tvm_plan_destroy(None)


def test_any_number_of_threads_may_be_asked_for() -> None:
    # More rows than the process could ever have threads; in a process of its own, because what is tested is a crash.
    program = (
        "import numpy as np, dsa_tvm\n"
        "rows, n = 100_000, 2**31 - 1\n"
        "x, zero, two = np.zeros((rows, 2), 'f'), np.zeros(rows, 'i4'), np.full(rows, 2, 'i4')\n"
        "assert (dsa_tvm.topk(x, zero, two, 1, num_threads=n) == 0).all()\n"
        "dsa_tvm.set_num_threads(n)\n"
        "assert (dsa_tvm.topk(x, zero, two, 1) == 0).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
