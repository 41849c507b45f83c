"""The models of sm_90a's barriers and waits: rings of stages work, and mistakes that a GPU hides are errors."""

from __future__ import annotations

import numpy as np
import pytest

from emulator import Emulator, KernelError, TensorMap

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source

KERNELS = r"""
#include <primitives.cuh>
#include <helpers.cuh>
#include <hopper.cuh>

// A ring of two stages: warp 0 brings 32 numbers at a time, warps 1 and 2 add them up. Mode 0 by a tensor map, 1 by
// cp.async; other modes leave something out.
extern "C" __global__ void __launch_bounds__(96) ring(
    const __grid_constant__ CUtensorMap map, int* x, int* y, int rounds, int mode) {
  DSA_SHARED_POOL(pool);
  int* stage = (int*)(pool + 128);
  uchar* full = pool;
  uchar* empty = pool + 16;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < 2; s++) {
      dsa_mbarrier_init(full + 8 * s, mode == 1 ? 32 : 1);
      dsa_mbarrier_init(empty + 8 * s, 2);
    }
    if (mode != 2) dsa_mbarrier_fence();
  }
  if (mode != 3) __syncthreads();
  if (warp == 0) {
    for (int r = 0; r < rounds; r++) {
      int s = r % 2;
      if (mode != 4) dsa_mbarrier_wait(empty + 8 * s, r / 2 % 2 ^ 1);
      if (mode == 1) {
        dsa_cp_async_4(stage + 32 * s + lane, x + 32 * r + lane, 1);
        dsa_cp_async_arrive(full + 8 * s);
      } else if (lane == 0) {
        dsa_mbarrier_expect(full + 8 * s, mode == 5 && r == 3 ? 256 : 128);
        dsa_tma_load_2d(stage + 32 * s, map, full + 8 * s, 0, r);
      }
    }
  } else {
    int sum = 0;
    for (int r = 0; r < rounds; r++) {
      int s = r % 2;
      if (mode != 6) dsa_mbarrier_wait(full + 8 * s, r / 2 % 2);
      sum += stage[32 * s + lane] * (r + 1);
      __syncwarp();
      if (lane == 0) dsa_mbarrier_arrive(empty + 8 * s);
    }
    y[threadIdx.x - 32] = sum;
  }
  if (mode == 6) dsa_mbarrier_wait(full, (rounds - 1) / 2 % 2);
}

extern "C" __global__ void __launch_bounds__(64) meet_once(int* y) {
  DSA_SHARED_POOL(pool);
  if (threadIdx.x < 32) {
    ((int*)pool)[threadIdx.x] = threadIdx.x;
    dsa_barrier_arrive(1, 64);
  } else {
    dsa_barrier(1, 64);
    y[threadIdx.x - 32] = ((int*)pool)[threadIdx.x - 32];
  }
}

// What is wrong is a number.
extern "C" __global__ void __launch_bounds__(128) misuse(float* c, int wrong) {
  DSA_SHARED_POOL(pool);
  float sums[16];
  for (int i = 0; i < 2048; i += 128) ((uint*)pool)[i + threadIdx.x] = 0x3F803F80;
  for (int i = 0; i < 16; i++) sums[i] = 1;
  dsa_fence_async();
  __syncthreads();
  uint64_t at = dsa_descriptor<128>(pool + (wrong == 1 ? 128 : 0), 16, 1024);
  if (wrong == 2 && threadIdx.x < 64) at += 2;
  if (wrong == 3) at += 8;
  if (wrong == 4) at += 1024;
  if (wrong != 5) dsa_wgmma_fence();
  dsa_wgmma_bf16<32, 0>(sums, at, at, 1);
  dsa_wgmma_commit();
  if (wrong == 6) sums[3] = 5;
  if (wrong == 7) {
    __syncthreads();
    for (int i = 0; i < 2048; i += 128) ((uint*)pool)[i + threadIdx.x] = 0;
    dsa_fence_async();
    __syncthreads();
  }
  if (wrong != 8) dsa_wgmma_wait<0>();
  if (wrong == 9) {
    dsa_wgmma_fence();
    dsa_wgmma_bf16<32, 0>(sums, at, at, 1);
    dsa_wgmma_commit();
    dsa_wgmma_wait<1>();
    dsa_wgmma_hold<16>(sums);
  }
  for (int i = 0; i < 16; i++) c[i * 128 + threadIdx.x] = sums[i];
}

DSA_DEVICE void share(int* y, int wrong) {
  if (threadIdx.x < 128) {
    dsa_fewer_registers<24>();
    if (wrong == 1) dsa_more_registers<40>();
    if (wrong == 2) dsa_fewer_registers<32>();
  } else {
    dsa_more_registers<240>();
  }
  y[threadIdx.x] = 1;
}
extern "C" __global__ void __launch_bounds__(384, 1) share_registers(int* y, int wrong) { share(y, wrong); }
extern "C" __global__ void __launch_bounds__(384, 2) share_with_another_block(int* y) { share(y, 0); }
"""

#: Orders of threads and whether asynchronous work is done at once.
SCHEDULES = [(order, eager) for order in (0, 1, 2, 7) for eager in (False, True)]


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(KERNELS, source.DEVICE_HEADERS, tmp_path_factory.mktemp("rings"))


def _ring(emulator, rounds, mode, order, eager):
    x = np.random.default_rng(rounds).integers(-99, 99, (rounds, 32), dtype=np.int32)
    y = np.zeros(64, np.int32)
    arguments = (TensorMap(x, (1, 32), 0), x, y, rounds, mode)
    emulator.launch("ring", (1,), *arguments, shared_bytes=128 + 256, order=order, eager=eager)
    return y, np.tile((x * np.arange(1, rounds + 1)[:, None]).sum(0), 2)


@pytest.mark.parametrize(("order", "eager"), SCHEDULES)
@pytest.mark.parametrize("mode", [0, 1])
def test_ring(emulator, mode, order, eager):
    for rounds in (1, 2, 3, 10):
        np.testing.assert_array_equal(*_ring(emulator, rounds, mode, order, eager))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (2, "thread 0: mbarrier at 0x4.. was not fenced"),
        (3, "no mbarrier was initialized at 0x4"),
        (4, "hangs: .* at the mbarrier at byte|more than 1 arrivals"),
        (
            5,
            "hangs: .* 64 threads from 32 on at the mbarrier at byte 8 for parity 1: phase 1 lacks 0 of 1 .* 128 bytes",
        ),
    ],
)
def test_wrong_rings(emulator, mode, message):
    with pytest.raises(KernelError, match=message):
        for order, eager in SCHEDULES:
            _ring(emulator, 8, mode, order, eager)


def test_a_missing_wait_shows(emulator):
    """It shows in the results if bytes are late, and in the phases if the reader is late."""
    wrong = 0
    for order, eager in SCHEDULES:
        try:
            y, expected = _ring(emulator, 2, 6, order, eager)
            wrong += (y != expected).any()
        except KernelError:
            wrong += 1
    assert wrong


@pytest.mark.parametrize(("order", "eager"), SCHEDULES)
def test_arriving_at_a_barrier(emulator, order, eager):
    y = np.zeros(32, np.int32)
    emulator.launch("meet_once", (1,), y, shared_bytes=128, order=order, eager=eager)
    np.testing.assert_array_equal(y, np.arange(32))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (1, "begins within a pattern of 8 rows"),
        (2, "the warps of a warpgroup issue different products"),
        (3, "begins within a pattern|passes the end"),
        (4, "wgmma reads shared memory at"),
        (5, "wgmma without a wgmma_fence"),
        (9, "wgmma_hold: sums in the making"),
    ],
)
def test_errors(emulator, wrong, message):
    with pytest.raises(KernelError, match=message):
        emulator.launch("misuse", (1,), np.zeros((16, 128), np.float32), wrong, shared_bytes=8192)


@pytest.mark.parametrize("eager", [False, True])
def test_sums_belong_to_the_product_until_the_wait(emulator, eager):
    def sums(wrong):
        c = np.zeros((16, 128), np.float32)
        emulator.launch("misuse", (1,), c, wrong, shared_bytes=8192, eager=eager)
        return c

    np.testing.assert_array_equal(sums(0), 17)
    np.testing.assert_array_equal(sums(6), 17)
    np.testing.assert_array_equal(sums(7), 17 if eager else 1)
    assert np.isnan(sums(8)).all()


def test_registers_of_warpgroups(emulator):
    emulator.launch("share_registers", (1,), np.zeros(384, np.int32), 0)
    with pytest.raises(KernelError, match="setmaxnreg: 66560 registers, of 64512"):
        emulator.launch("share_registers", (1,), np.zeros(384, np.int32), 1)
    with pytest.raises(KernelError, match="setmaxnreg: dec, but from 24 to 32 registers"):
        emulator.launch("share_registers", (1,), np.zeros(384, np.int32), 2)
    with pytest.raises(KernelError, match=r"setmaxnreg: .* registers, of 30720"):
        emulator.launch("share_with_another_block", (1,), np.zeros(384, np.int32))
