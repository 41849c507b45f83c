"""The emulator computes like the instructions, and finds errors that a GPU would not report."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from emulator import Emulator, KernelError

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source

KERNELS = r"""
#include <primitives.cuh>
#include <helpers.cuh>

// The dot products of the rows of a [16, K] and b [8, K], through shared memory and ldmatrix.
template <int K, typename Element, typename Sum, typename Mma>
DSA_DEVICE void product(char* pool, const Element* a, const Element* b, Sum* c, Mma mma) {
  Element* rows = (Element*)pool;
  int lane = threadIdx.x, chunk = 16 / sizeof(Element);
  for (int i = lane; i < 24 * K / chunk; i += 32)
    dsa_copy_16(rows + i * chunk, i < 16 * K / chunk ? a + i * chunk : b + (i - 16 * K / chunk) * chunk,
                sizeof(Element), 1);
  dsa_cp_async_commit();
  dsa_cp_async_wait(0);
  __syncthreads();
  unsigned fa[4], fb[4];
  Sum sum[4] = {0, 0, 0, 0};
  dsa_ldmatrix_x4(fa, rows + lane % 16 * K + lane / 16 * chunk);
  dsa_ldmatrix_x4(fb, rows + (16 + lane % 8) * K + lane / 8 % 2 * chunk);
  mma(sum, fa, fb);
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

extern "C" __global__ void __launch_bounds__(32) product_bf16(ushort* a, ushort* b, float* c) {
  DSA_SHARED_POOL(pool);
  product<16>((char*)pool, a, b, c, dsa_mma_bf16);
}
extern "C" __global__ void __launch_bounds__(32) product_f16(ushort* a, ushort* b, float* c) {
  DSA_SHARED_POOL(pool);
  product<16>((char*)pool, a, b, c, dsa_mma_f16);
}
extern "C" __global__ void __launch_bounds__(32) product_s8(uchar* a, uchar* b, int* c) {
  DSA_SHARED_POOL(pool);
  product<32>((char*)pool, a, b, c, dsa_mma_s8);
}
extern "C" __global__ void __launch_bounds__(32) product_e4m3(uchar* a, uchar* b, float* c) {
  DSA_SHARED_POOL(pool);
  product<32>((char*)pool, a, b, c, dsa_mma_e4m3);
}

extern "C" __global__ void __launch_bounds__(32) transpose(ushort* x, uint* y) {
  DSA_SHARED_POOL(pool);
  ushort* rows = (ushort*)pool;
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) rows[i] = x[i];
  __syncwarp();
  uint r[4];
  dsa_ldmatrix_x4_trans(r, rows + lane * 8);
  for (int i = 0; i < 4; i++) y[lane * 4 + i] = r[i];
}

extern "C" __global__ void __launch_bounds__(256) widen(uint* y) {
  y[threadIdx.x] = dsa_e4m3x2_to_f16x2(threadIdx.x | (255 - threadIdx.x) << 8);
}

extern "C" __global__ void __launch_bounds__(64) exchange(int* y, int wrong) {
  DSA_SHARED_POOL(pool);
  ((int*)pool)[threadIdx.x] = threadIdx.x;
  if (wrong == 0) __syncthreads();
  if (wrong == 2 && threadIdx.x < 32) __syncthreads();
  if (wrong == 3 && threadIdx.x == 5) return;
  if (wrong == 4) dsa_ballot(1) + (threadIdx.x & 1 ? dsa_shuffle(1, 0) : dsa_shuffle_xor(1, 1));
  if (wrong == 5) ((int*)pool)[64 + threadIdx.x] = 1;
  if (wrong == 6) y[threadIdx.x - 1] = 1;
  y[threadIdx.x] = dsa_shuffle(((int*)pool)[threadIdx.x ^ 33], dsa_lane());
}

extern "C" __global__ void __launch_bounds__(32) fetch(int* x, int* y, int pending) {
  DSA_SHARED_POOL(pool);
  int* to = (int*)pool + threadIdx.x;
  for (int i = 0; i < 2; i++) {
    dsa_cp_async_4(to + 32 * i, x + 32 * i + threadIdx.x, threadIdx.x != 7);
    dsa_cp_async_commit();
  }
  dsa_cp_async_wait(pending);
  for (int i = 0; i < 2; i++) y[32 * i + threadIdx.x] = to[32 * i];
}
"""


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(KERNELS, source.DEVICE_HEADERS, tmp_path_factory.mktemp("emulator"))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "dtype", "k", "wide"),
    [
        ("bf16", ml_dtypes.bfloat16, 16, np.float32),
        ("f16", np.float16, 16, np.float32),
        ("s8", np.int8, 32, np.int32),
        ("e4m3", ml_dtypes.float8_e4m3fn, 32, np.float32),
    ],
)
def test_matrix_product(emulator, name, dtype, k, wide, order):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-9, 9, (16, k)).astype(dtype), rng.integers(-9, 9, (8, k)).astype(dtype)
    c = np.zeros((16, 8), wide)
    emulator.launch(f"product_{name}", (1,), a, b, c, shared_bytes=24 * k * a.itemsize, order=order)
    np.testing.assert_array_equal(c, a.astype(wide) @ b.astype(wide).T)


def test_narrow_sums(emulator):
    """Addends and sums lose what is behind so many places: not more, and towards zero."""

    def products(*x):
        a, b = np.zeros((16, 32), ml_dtypes.float8_e4m3fn), np.zeros((8, 32), ml_dtypes.float8_e4m3fn)
        a[0, : len(x)], b[0, : len(x)] = np.abs(x), np.copysign(1, x)
        found = []
        for sum_bits in (0, 4):
            c = np.zeros((16, 8), np.float32)
            with emulator.narrow_sums(sum_bits):
                emulator.launch("product_e4m3", (1,), a, b, c, shared_bytes=24 * 32)
            assert not c[1:].any()
            found.append(float(c[0, 0]))
        return found

    assert products(16, 1) == [17, 17] and products(16, -1) == [15, 15]
    assert products(16, 1.5) == [17.5, 17] and products(16, -1.5) == [14.5, 15]
    assert products(30, 1, 1, 0.75) == [32.75, 32]
    assert products(256, -256, 1.25) == [1.25, 0]
    assert all(np.isnan(products(np.nan, 1)))
    assert products() == [0, 0]


def test_transposed_load(emulator):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    y = np.zeros((32, 4), np.uint32)
    emulator.launch("transpose", (1,), x, y, shared_bytes=512)
    pairs = y.view(np.uint16).reshape(8, 4, 4, 2).transpose(2, 0, 1, 3).reshape(4, 8, 8)
    np.testing.assert_array_equal(pairs, x.transpose(0, 2, 1))


def test_bank_conflicts(emulator):
    """Rows of 16 bytes that are 32 apart: two of 8 have the same banks. Side by side none have."""
    a, b = np.zeros((16, 16), np.float16), np.zeros((8, 16), np.float16)
    emulator.launch("product_f16", (3,), a, b, np.zeros((16, 8), np.float32), shared_bytes=768)
    assert emulator.bank_conflicts == 3 * 2 * 4
    emulator.launch("transpose", (1,), np.zeros((4, 8, 8), np.uint16), np.zeros((32, 4), np.uint32), shared_bytes=512)
    assert emulator.bank_conflicts == 0


def test_e4m3(emulator):
    y = np.zeros(256, np.uint32)
    emulator.launch("widen", (1,), y)
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    low, high = y.view(np.float16).reshape(256, 2).T.astype(np.float32)
    np.testing.assert_array_equal(low, expected)
    np.testing.assert_array_equal(high, expected[::-1])
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(low[finite]), np.signbit(expected[finite]))


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_barrier(emulator, order):
    y = np.zeros(64, np.int32)
    emulator.launch("exchange", (1,), y, 0, shared_bytes=256, order=order)
    np.testing.assert_array_equal(y, np.arange(64) ^ 33)


def test_a_missing_barrier_shows(emulator):
    y = np.zeros(64, np.int32)
    emulator.launch("exchange", (1,), y, 1, shared_bytes=256)
    assert (y != np.arange(64) ^ 33).any()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (2, "hangs: 0 threads at a warp operation .* 32 at a barrier, 32 have ended"),
        (3, "hangs: 31 threads at a warp operation .shuffle., 0 at a barrier"),
        (4, "the warp meets at shuffle and at shuffle_xor|the warp meets at shuffle_xor and at shuffle"),
        (5, "thread 0: access to address"),
        (6, "thread 0: access to address"),
    ],
)
def test_errors(emulator, wrong, message):
    with pytest.raises(KernelError, match=message):
        emulator.launch("exchange", (2,), np.zeros(64, np.int32), wrong, shared_bytes=256, order=3 if wrong == 6 else 0)


@pytest.mark.parametrize("eager", [False, True])
def test_asynchronous_copies(emulator, eager):
    x = np.arange(1, 65, dtype=np.int32)
    expected = x.reshape(2, 32).copy()
    expected[:, 7] = 0
    for pending in (0, 1):
        y = np.zeros((2, 32), np.int32)
        emulator.launch("fetch", (1,), x, y, pending, shared_bytes=256, eager=eager)
        np.testing.assert_array_equal(y[0], expected[0])
        np.testing.assert_array_equal(y[1], expected[1] if eager or not pending else np.full(32, -1))
