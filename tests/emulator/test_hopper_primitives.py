"""The models of sm_90a's products and box copies compute like the instructions."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from emulator import Emulator, TensorMap

pytest.importorskip("tvm")

from dsa_tvm.schedules.cuda import source

KERNELS = r"""
#include <primitives.cuh>
#include <helpers.cuh>
#include <hopper.cuh>

struct Bf16Product {};
struct F16Product {};
struct E4m3Product {};
template <int N, int MN_MAJOR, typename A> DSA_DEVICE void add(Bf16Product, float* c, A a, uint64_t b, int accumulate) {
  dsa_wgmma_bf16<N, MN_MAJOR>(c, a, b, accumulate);
}
template <int N, int MN_MAJOR, typename A> DSA_DEVICE void add(F16Product, float* c, A a, uint64_t b, int accumulate) {
  dsa_wgmma_f16<N, MN_MAJOR>(c, a, b, accumulate);
}
template <int N, int MN_MAJOR, typename A> DSA_DEVICE void add(E4m3Product, float* c, A a, uint64_t b, int accumulate) {
  dsa_wgmma_e4m3<N>(c, a, b, accumulate);
}

// c[64 G x N] = a[64 G x K] b, K elements in SWIZZLE bytes; G warpgroups. b is [N, K], or [K, N] and MN-major.
template <int G, int N, int MN_MAJOR, int SWIZZLE, int BYTES, typename Product>
DSA_DEVICE void product(const CUtensorMap& a, const CUtensorMap& b, float* c) {
  DSA_SHARED_POOL(pool);
  constexpr int K = SWIZZLE / BYTES, BLOCKS = (N * BYTES + SWIZZLE - 1) / SWIZZLE;
  uchar* rows = pool;
  uchar* columns = rows + G * 64 * SWIZZLE;
  uchar* barrier = columns + (MN_MAJOR ? BLOCKS * K : N) * SWIZZLE;
  if (threadIdx.x == 0) {
    dsa_mbarrier_init(barrier, 1);
    dsa_mbarrier_fence();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    dsa_tma_prefetch(a);
    dsa_mbarrier_expect(barrier, G * 64 * SWIZZLE + (MN_MAJOR ? BLOCKS * K : N) * SWIZZLE);
    for (int i = 0; i < G; i++) dsa_tma_load_2d(rows + i * 64 * SWIZZLE, a, barrier, 0, 64 * i);
    if (MN_MAJOR)
      for (int i = 0; i < BLOCKS; i++) dsa_tma_load_2d(columns + i * K * SWIZZLE, b, barrier, i * K, 0);
    else
      dsa_tma_load_2d(columns, b, barrier, 0, 0);
  }
  dsa_mbarrier_wait(barrier, 0);
  int group = dsa_shuffle(threadIdx.x / 128, 0), lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  uint64_t at_a = dsa_descriptor<SWIZZLE>(rows + group * 64 * SWIZZLE, 16, 8 * SWIZZLE);
  uint64_t at_b = dsa_descriptor<SWIZZLE>(columns, MN_MAJOR ? K * SWIZZLE : 16, 8 * SWIZZLE);
  float sums[N / 2];
  dsa_wgmma_fence();
#pragma unroll
  for (int k = 0; k < SWIZZLE / 32; k++)
    add<N, MN_MAJOR>(Product(), sums, at_a + 2 * k, at_b + (MN_MAJOR ? SWIZZLE * k : 2 * k), k);
  dsa_wgmma_commit();
  dsa_wgmma_wait<0>();
  dsa_wgmma_hold<N / 2>(sums);
  c += (group * 64 + warp * 16) * N;
#pragma unroll
  for (int i = 0; i < N / 2; i++) c[(lane / 4 + i / 2 % 2 * 8) * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// c[64 x N] += a[64 x 16] b[16 x N] with a in registers and b written by threads.
template <int N, typename Product>
DSA_DEVICE void product_of_registers(const ushort* a, const ushort* b, float* c, int fenced) {
  DSA_SHARED_POOL(pool);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  for (int i = threadIdx.x; i < 16 * N; i += 128) {
    int k = i / N, n = i % N, at = n / 64 * 2048 + k * 128 + n % 64 * 2;
    *(ushort*)(pool + (at ^ (at >> 7 & 7) << 4)) = b[i];
  }
  if (fenced) dsa_fence_async();
  __syncthreads();
  unsigned words[4];
  float sums[N / 2];
  for (int i = 0; i < 4; i++) words[i] = *(const uint*)(a + (warp * 16 + g + i % 2 * 8) * 16 + i / 2 * 8 + 2 * t);
  c += warp * 16 * N;
#pragma unroll
  for (int i = 0; i < N / 2; i++) sums[i] = c[(g + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2];
  dsa_wgmma_hold<4>(words);
  dsa_wgmma_hold<N / 2>(sums);
  dsa_wgmma_fence();
  add<N, 1, const unsigned*>(Product(), sums, words, dsa_descriptor<128>(pool, 2048, 1024), 1);
  dsa_wgmma_commit();
  dsa_wgmma_wait<0>();
  dsa_wgmma_hold<N / 2>(sums);
#pragma unroll
  for (int i = 0; i < N / 2; i++) c[(g + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2] = sums[i];
}

extern "C" __global__ void __launch_bounds__(128) registers_bf16(ushort* a, ushort* b, float* c, int fenced) {
  product_of_registers<128, Bf16Product>(a, b, c, fenced);
}
extern "C" __global__ void __launch_bounds__(128) registers_f16(ushort* a, ushort* b, float* c, int fenced) {
  product_of_registers<64, F16Product>(a, b, c, fenced);
}

extern "C" __global__ void __launch_bounds__(32) load_box(
    const __grid_constant__ CUtensorMap x, uint* y, int words, int i, int j, int k) {
  DSA_SHARED_POOL(pool);
  if (threadIdx.x == 0) {
    dsa_mbarrier_init(pool, 1);
    dsa_mbarrier_fence();
    dsa_mbarrier_expect(pool, words * 4);
    if (k < 0)
      dsa_tma_load_2d(pool + 1024, x, pool, i, j);
    else
      dsa_tma_load_3d(pool + 1024, x, pool, i, j, k);
  }
  __syncwarp();
  dsa_mbarrier_wait(pool, 0);
  for (int w = threadIdx.x; w < words; w += 32) y[w] = ((uint*)(pool + 1024))[w];
}
"""


#: Orders of threads and whether asynchronous work is done at once.
SCHEDULES = [(order, eager) for order in (0, 1, 2, 7) for eager in (False, True)]

DTYPES = {"Bf16": ml_dtypes.bfloat16, "F16": np.float16, "E4m3": ml_dtypes.float8_e4m3fn}


def products():
    for n in (32, 64, 128, 256):
        yield from ((t, n, major, 128) for t, major in itertools.product(("Bf16", "F16"), (0, 1)))
        yield "E4m3", n, 0, 128
    yield from (("Bf16", 64, 0, 64), ("Bf16", 64, 1, 64), ("F16", 32, 0, 32), ("F16", 64, 1, 32))
    yield from (("E4m3", 64, 0, 64), ("E4m3", 32, 0, 32))


def product_kernel(kind, n, major, swizzle):
    """The text of one kernel."""
    parameters = "const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, float* c"
    template = f"product<2, {n}, {major}, {swizzle}, {np.dtype(DTYPES[kind]).itemsize}, {kind}Product>"
    name = f"product_{kind}_{n}_{major}_{swizzle}"
    return f'extern "C" __global__ void __launch_bounds__(256) {name}({parameters}) {{ {template}(a, b, c); }}'


TEXT = "\n".join((KERNELS, *(product_kernel(*p) for p in products())))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return Emulator(TEXT, source.DEVICE_HEADERS, tmp_path_factory.mktemp("hopper"))


def _numbers(rng, shape, dtype):
    return rng.integers(-8, 9, shape).astype(np.float32).astype(dtype)


@pytest.mark.parametrize(("kind", "n", "major", "swizzle"), list(products()))
def test_product(emulator, kind, n, major, swizzle):
    rng = np.random.default_rng(n)
    dtype = np.dtype(DTYPES[kind])
    k = swizzle // dtype.itemsize
    a, b = _numbers(rng, (128, k), dtype), _numbers(rng, (n, k), dtype)
    # A pattern of [K, N] has K columns, and the last may be narrower.
    stored = np.ascontiguousarray(b.T) if major else b
    maps = TensorMap(a, (64, k), swizzle), TensorMap(stored, (k, k) if major else (n, k), swizzle)
    tiles = -(-n // k) * k if major else n
    shared = 128 * swizzle + tiles * swizzle + 8
    for order, eager in SCHEDULES[n // 64 % 4 :: 3]:
        c = np.full((128, n), 77, np.float32)
        name = f"product_{kind}_{n}_{major}_{swizzle}"
        emulator.launch(name, (1,), *maps, c, shared_bytes=shared, order=order, eager=eager)
        np.testing.assert_array_equal(c, a.astype(np.float32) @ b.astype(np.float32).T)


@pytest.mark.parametrize(("kind", "n"), [("bf16", 128), ("f16", 64)])
@pytest.mark.parametrize(("order", "eager"), SCHEDULES)
def test_product_of_registers(emulator, kind, n, order, eager):
    rng = np.random.default_rng(order)
    dtype = DTYPES[kind.capitalize()]
    a, b = _numbers(rng, (64, 16), dtype), _numbers(rng, (16, n), dtype)
    start = _numbers(rng, (64, n), np.float32)
    c = start.copy()
    shared = 2048 * n // 64
    emulator.launch(f"registers_{kind}", (1,), a, b, c, 1, shared_bytes=shared, order=order, eager=eager)
    np.testing.assert_array_equal(c, start + a.astype(np.float32) @ b.astype(np.float32))
    c = start.copy()
    emulator.launch(f"registers_{kind}", (1,), a, b, c, 0, shared_bytes=shared, order=order, eager=eager)
    assert np.isnan(c).all(), "without the fence, what threads wrote is not seen"


def _unswizzled(words, row_bytes, swizzle):
    raw = words.view(np.uint8)
    if swizzle:
        at = np.arange(raw.size)
        raw = raw[at ^ (at >> 7 & (swizzle // 16 - 1)) << 4]
    return raw.reshape(-1, row_bytes)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("order", "eager"), SCHEDULES)
def test_boxes(emulator, swizzle, order, eager):
    x = np.random.default_rng(0).integers(1, 2**16, (5, 21, 96), dtype=np.uint16)
    padded = np.zeros((16, 64, 256), np.uint16)
    padded[4:9, 16:37, 64:160] = x
    width = (swizzle or 48) // 2
    for i, j, k in ((0, 0, 0), (8, 3, 2), (90, 15, 3), (-8, -5, -2), (200, 0, 0), (0, 60, 1)):
        if k >= 0:
            box = TensorMap(x, (3, 9, width), swizzle)
            expected = np.zeros((3, 9, width), np.uint16)
            part = padded[4 + k : 7 + k, 16 + j : 25 + j, 64 + i : 64 + i + width]
        else:
            box = TensorMap(x[1], (9, width), swizzle)
            expected = np.zeros((1, 9, width), np.uint16)
            part = padded[5:6, 16 + j : 25 + j, 64 + i : 64 + i + width]
        expected[: part.shape[0], : part.shape[1], : part.shape[2]] = part
        expected = expected.view(np.uint8).reshape(-1, 2 * width)
        y = np.zeros(expected.size // 4, np.uint32)
        room = 1024 + expected.size
        emulator.launch("load_box", (1,), box, y, len(y), i, j, k, shared_bytes=room, order=order, eager=eager)
        np.testing.assert_array_equal(_unswizzled(y, 2 * width, swizzle), expected)


@pytest.mark.parametrize(
    ("array", "box", "swizzle"),
    [
        (np.zeros((4, 10), np.uint8), (4, 16), 0),  # rows of 10 bytes
        (np.zeros((4, 64), np.uint8), (4, 8), 0),  # 8 bytes of a row
        (np.zeros((400, 64), np.uint8), (257, 64), 0),
        (np.zeros((4, 512), np.uint8), (4, 256), 128),
        (np.zeros((0, 64), np.uint8), (4, 64), 64),
    ],
)
def test_what_the_driver_would_not_encode(emulator, array, box, swizzle):
    with pytest.raises(ValueError, match="cuTensorMapEncodeTiled: error 1"):
        emulator.launch("load_box", (1,), TensorMap(array, box, swizzle), np.zeros(1, np.uint32), 1, 0, 0, -1)
