"""Writing rows to a cache: which rows stay, what else changes, and all ways to write in place."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from devices import needs_inductor

import dsa_tvm
from dsa_tvm.ops import OPS

SPEC = OPS["write_rows"]
TYPES = [v["T"] for v in SPEC.variants]


def bits(rng, shape, dtype):
    """Random bits: numbers, subnormals, infinities and NaN with any payload."""
    numpy_type = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return rng.integers(0, 256, (*shape[:-1], shape[-1] * numpy_type.itemsize), np.uint8).view(numpy_type)


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def arguments(dtype="float32", batch=3, capacity=50, s_new=20, d_row=24, seed=0):
    rng = np.random.default_rng(seed)
    positions = rng.integers(-3, capacity + 3, (batch, s_new)).astype(np.int32)
    return bits(rng, (batch, capacity, d_row), dtype), bits(rng, (batch, s_new, d_row), dtype), positions


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("d_row", [1, 24, 656])
def test_every_bit_of_every_type(dtype, d_row):
    cache, rows, positions = arguments(dtype, d_row=d_row)
    (expected,) = SPEC.reference(cache, rows, positions)
    before = cache.copy()
    assert same_bits(dsa_tvm.write_rows(cache, rows, positions), expected)
    assert same_bits(cache, before)
    assert dsa_tvm.write_rows(cache, rows, positions, out=cache) is cache
    assert same_bits(cache, expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_last_of_equal_positions_wins_on_any_number_of_threads(threads):
    """Enough rows for every thread go to a few positions of the cache."""
    rng = np.random.default_rng(threads)
    for positions in (rng.integers(0, 5, (2, 4000)), np.full((2, 4000), 3), np.arange(8000).reshape(2, 4000) % 50):
        cache, rows, _ = arguments("float32", 2, 50, 4000, 160)
        (expected,) = SPEC.reference(cache, rows, positions)
        for out in (None, cache):
            got = dsa_tvm.write_rows(cache, rows, positions.astype(np.int32), out=out, num_threads=threads)
            assert same_bits(got, expected)


@pytest.mark.parametrize("lengths", list(itertools.product((0, 2), (0, 5), (0, 3))))
def test_nothing_to_write_or_nowhere_to_write_it(lengths):
    cache, rows, positions = arguments("bfloat16", *lengths)
    (expected,) = SPEC.reference(cache, rows, positions)
    assert same_bits(dsa_tvm.write_rows(cache, rows, positions), expected)
    assert same_bits(dsa_tvm.write_rows(cache, rows, positions, out=cache), expected)


def test_a_large_cache_is_copied_whole():
    """Several tasks copy it, and the last one is shorter."""
    cache, rows, positions = arguments("uint8", 3, 1999, 5, 656)
    out = np.zeros_like(cache)
    assert dsa_tvm.write_rows(cache, rows, positions, out=out, num_threads=3) is out
    assert same_bits(out, SPEC.reference(cache, rows, positions)[0])


@pytest.mark.parametrize("shift", [-1, 1, 24, -50 * 24])
def test_overlap_that_is_not_the_whole_cache_is_refused(shift):
    """The overlap is shifted by an element, a row or a sequence."""
    cache, rows, positions = arguments("int8")
    memory = np.zeros(3 * cache.size, np.int8)
    inside = memory[cache.size : 2 * cache.size].reshape(cache.shape)
    out = memory[cache.size + shift : 2 * cache.size + shift].reshape(cache.shape)
    with pytest.raises(
        dsa_tvm.ArgumentError, match=r"out: expected `cache` itself, or memory that does not overlap `cache`"
    ):
        dsa_tvm.write_rows(inside, rows, positions, out=out)
    assert not memory.any()


def test_new_rows_out_of_the_cache_itself_are_refused_in_place():
    cache, _, positions = arguments("int8", 1, 50, 20)
    with pytest.raises(
        dsa_tvm.ArgumentError, match=r"out: expected `cache` itself, or memory that does not overlap `rows`"
    ):
        dsa_tvm.write_rows(cache, cache[:, 30:50], positions, out=cache)
    dsa_tvm.write_rows(cache, cache[:, 30:50], positions)  # two inputs may share what they like


def test_the_caches_own_operators_alone_may_be_in_place():
    """ONNX Runtime's question for such pairs has a generated answer for the first input and output only."""
    pairs = {(s.name, i, t.may_be) for s in OPS.values() for i, t in enumerate(s.outputs) if t.may_be}
    assert pairs == {("write_rows", 0, SPEC.inputs[0].name)}
    for spec in OPS.values():
        for t in spec.outputs:
            if t.may_be:
                of = next(x for x in spec.inputs if x.name == t.may_be)
                assert (of.dtype, of.shape, of.optional) == (t.dtype, t.shape, False)


class TestTorch:
    @pytest.fixture(autouse=True)
    def registered(self):
        pytest.importorskip("torch")
        import dsa_tvm.torch_ops  # noqa: F401

    def tensors(self, dtype="float32", **lengths):
        from devices import to_device

        return [to_device(x, "cpu") for x in arguments(dtype, **lengths)]

    @pytest.mark.parametrize("dtype", TYPES)
    def test_in_place(self, dtype):
        import torch

        cache, rows, positions = self.tensors(dtype)
        expected = torch.ops.dsa_tvm.write_rows(cache, rows, positions)
        version, address = cache._version, cache.data_ptr()
        assert torch.ops.dsa_tvm.write_rows_(cache, rows, positions) is None
        assert torch.equal(cache.view(torch.uint8), expected.view(torch.uint8))
        assert cache._version > version and cache.data_ptr() == address

    def test_opcheck(self):
        import torch

        torch.library.opcheck(torch.ops.dsa_tvm.write_rows_.default, tuple(self.tensors()))

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_inductor)])
    def test_a_compiled_step_writes_where_the_cache_lies(self, backend):
        import torch

        def step(cache, rows, positions):
            torch.ops.dsa_tvm.write_rows_(cache, rows * 2, positions)
            return cache[:, :4] + 1

        rng = np.random.default_rng(0)
        cache, rows = (torch.tensor(rng.standard_normal((2, n, 8), np.float32)) for n in (30, 5))
        positions = torch.randint(-2, 32, (2, 5), dtype=torch.int32)
        mine, address = cache.clone(), cache.data_ptr()
        expected = step(mine, rows, positions)
        assert torch.equal(torch.compile(step, backend=backend, fullgraph=True)(cache, rows, positions), expected)
        assert torch.equal(cache, mine) and cache.data_ptr() == address

    def test_a_cache_that_asks_for_gradients_is_refused(self):
        import torch

        cache, rows, positions = self.tensors(dtype="float32")
        cache = cache.nan_to_num().requires_grad_()
        with pytest.raises(NotImplementedError, match="write_rows_ has no backward"):
            torch.ops.dsa_tvm.write_rows_(cache, rows, positions)
        with torch.no_grad():
            torch.ops.dsa_tvm.write_rows_(cache, rows, positions)
