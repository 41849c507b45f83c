"""Results have the same bits at every address that the element type allows, and nothing else is written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from doors import Door, check_memory, make_door, memories
from hostile import Call, valid_call
from hostile.samples import place

from dsa_tvm.ops import OPS

# Odd lengths, so that every loop of a kernel has a tail.
LENGTHS = {"s_q": 5, "s_kv": 133, "h_idx": 9, "d_idx": 128, "topk": 39, "h_q": 17, "d_qk": 576}
CASES = [pytest.param(op, v, id="-".join([op, *v.values()])) for op in OPS for v in OPS[op].variants]


@pytest.mark.parametrize("door_name", ["functions, NumPy", "functions, torch", "ONNX Runtime"])
@pytest.mark.parametrize("op, variant", CASES)
def test_any_alignment(op: str, variant: dict[str, str], door_name: str) -> None:
    door = make_door(door_name)
    spec = OPS[op]

    def fresh() -> Call:
        return valid_call(spec, variant, {d: n for d, n in LENGTHS.items() if d in spec.dims})

    expected = outputs_of(door, fresh())
    assert any(np.frombuffer(data, np.uint8).any() for data in expected)
    for names, offset in shifts(fresh()):
        call = fresh()
        for name in names:
            argument = call.tensor(name)
            argument.array = place(argument.array, offset=offset or argument.array.itemsize)
            assert argument.array.ctypes.data % 64 == (offset or argument.array.itemsize)
        assert outputs_of(door, call) == expected, f"{', '.join(names)}, offset {offset}"


def shifts(call: Call) -> Iterator[tuple[tuple[str, ...], int]]:
    """The arguments to move, and their distance in bytes from a 64-byte boundary; 0 stands for one element."""
    for names in [*((name,) for name in call.inputs | call.outputs), (*call.inputs, *call.outputs)]:
        for offset in (0, 4, 16):
            yield names, offset


def outputs_of(door: Door, call: Call) -> list[bytes]:
    """The outputs as bytes."""
    before = memories(call)
    outputs = door.run(call)
    check_memory(call, before)
    return [np.ascontiguousarray(x).tobytes() for x in outputs]
