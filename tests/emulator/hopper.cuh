/* The model of schedules/cuda/headers/hopper.cuh. */
#pragma once

#include "mbarrier.h"
#include "primitives.cuh"
#include "tensor_map.h"
#include "wgmma.h"

#define __grid_constant__

DSA_DEVICE void dsa_mbarrier_init(void *barrier, int count) { emulator::mbarrier_init(barrier, count); }
DSA_DEVICE void dsa_mbarrier_fence() {
  for (auto &[p, b] : emulator::m.mbarriers) b.fenced = true;
}
DSA_DEVICE void dsa_mbarrier_arrive(void *barrier) { emulator::mbarrier_arrive(barrier); }
DSA_DEVICE void dsa_mbarrier_expect(void *barrier, int bytes) {
  emulator::mbarrier_bytes(barrier, bytes);
  emulator::mbarrier_arrive(barrier);
}
DSA_DEVICE void dsa_mbarrier_wait(void *barrier, int parity) { emulator::mbarrier_wait(barrier, parity); }
DSA_DEVICE void dsa_fence_async() { emulator::publish(); }
/* An address where there is nothing faults here, and is ignored by a GPU. */
DSA_DEVICE void dsa_prefetch(const void *from) { (void)*(const volatile char *)from; }

DSA_DEVICE void dsa_barrier_arrive(int id, int threads) {
  if (emulator::barrier_arrive(id, threads)) emulator::pause();
}

DSA_DEVICE void dsa_cp_async_arrive(void *barrier) {
  emulator::Fiber &f = *emulator::m.current;
  std::vector<emulator::Copy> copies = std::move(f.open);
  for (auto &group : f.groups) copies.insert(copies.end(), group.begin(), group.end());
  f.open.clear();
  f.groups.clear();
  emulator::mbarrier_at(barrier);
  emulator::asynchronously([copies = std::move(copies), barrier] {
    for (const auto &copy : copies) emulator::land(copy);
    emulator::mbarrier_arrive(barrier);
  });
}

DSA_DEVICE unsigned swizzled(unsigned address, unsigned span) {
  /* Bits 4.. with as many bits from 7 on as the span has of 16 bytes. */
  return address ^ (address >> 7 & (span / 16 - 1)) << 4;
}

DSA_DEVICE void tma_load(void *to, const CUtensorMap &map, void *barrier, unsigned rank, int x, int y, int z) {
  if (map.written != MAP_WRITTEN || map.rank != rank) emulator::fail("no tensor map of %u dimensions", rank);
  unsigned address = emulator::shared_address(to), align = map.span ? 8 * map.span : 128;
  if (address % align) emulator::fail("a bulk copy to %#x, not aligned to %u", address, align);
  emulator::mbarrier_bytes(barrier, 0);
  emulator::asynchronously([=, map = &map] {
    const CUtensorMap &m = *map;
    unsigned row = m.box[0] * m.element_bytes;
    unsigned offset = address;
    for (int64_t k = z; k < z + (int64_t)m.box[2]; k++)
      for (int64_t j = y; j < y + (int64_t)m.box[1]; j++)
        for (unsigned b = 0; b < row; b += 16, offset += 16) {
          char chunk[16] = {};
          for (unsigned e = 0; e < 16; e += m.element_bytes) {
            int64_t i = x + (int64_t)((b + e) / m.element_bytes);
            bool inside = i >= 0 && i < (int64_t)m.lengths[0] && j >= 0 && j < (int64_t)m.lengths[1] && k >= 0 &&
                          k < (int64_t)m.lengths[2];
            if (inside)
              memcpy(chunk + e, m.base + i * m.element_bytes + j * m.strides[1] + k * m.strides[2], m.element_bytes);
          }
          emulator::deliver((m.span ? swizzled(offset, m.span) : offset) - 1024, chunk, 16);
        }
    emulator::mbarrier_complete(barrier, row * m.box[1] * m.box[2]);
  });
}
DSA_DEVICE void dsa_tma_load_2d(void *to, const CUtensorMap &map, void *barrier, int x, int y) {
  tma_load(to, map, barrier, 2, x, y, 0);
}
DSA_DEVICE void dsa_tma_load_3d(void *to, const CUtensorMap &map, void *barrier, int x, int y, int z) {
  tma_load(to, map, barrier, 3, x, y, z);
}
DSA_DEVICE void dsa_tma_prefetch(const CUtensorMap &map) {
  if (map.written != MAP_WRITTEN) emulator::fail("no tensor map");
}

/* Elements as wgmma reads them. */
template <typename Pair> struct Half {
  static constexpr unsigned BYTES = 2;
  static float get(const char *p) {
    uint16_t bits;
    memcpy(&bits, p, 2);
    return Pair::get(bits, 0);
  }
};
struct Byte {
  static constexpr unsigned BYTES = 1;
  static float get(const char *p) { return E4m3::value((uint8_t)*p); }
};

/* `columns[k][n]`, converted once; `rows` gives element (row, k) of the warp's 16. */
template <typename Element, unsigned K, typename Rows>
DSA_DEVICE void multiply(float *sums, int n, const emulator::Operand &b, Rows rows) {
  static float columns[K][256];
  for (unsigned j = 0; j < (unsigned)n; j++)
    for (unsigned k = 0; k < K; k++) columns[k][j] = b.get<Element>(j, k);
  if (emulator::m.options.sum_bits) {
    for (unsigned r = 0; r < 16; r++)
      for (int j = 0; j < n; j++) {
        float products[K];
        for (unsigned k = 0; k < K; k++) products[k] = rows(r, k) * columns[k][j];
        sums[r * n + j] = narrow_sum(sums[r * n + j], products, K);
      }
    return;
  }
  for (unsigned r = 0; r < 16; r++)
    for (unsigned k = 0; k < K; k++) {
      float x = rows(r, k);
      for (int j = 0; j < n; j++) sums[r * n + j] += x * columns[k][j];
    }
}

/* What a lane brings: A from shared memory, or its registers. */
struct WgmmaOperands {
  float *c;
  uint64_t a;
  const unsigned *registers;
  uint64_t b;
  int accumulate;
};

/* Lanes meet, and the last one issues for its warp. */
template <typename Element, unsigned K, int N, int MN_MAJOR, typename Pair>
DSA_DEVICE void wgmma_of(const char *name, float *c, uint64_t a, const unsigned *registers, uint64_t b, int accumulate) {
  WgmmaOperands mine = {c, a, registers, b, accumulate};
  emulator::meet(name, &mine, nullptr, [](const void **in, void **) {
    const WgmmaOperands &first = *(const WgmmaOperands *)in[0];
    emulator::Product p;
    p.n = N;
    p.accumulate = first.accumulate != 0;
    std::array<const unsigned *, 32> registers;
    for (int l = 0; l < 32; l++) {
      const WgmmaOperands &lane = *(const WgmmaOperands *)in[l];
      if (lane.a != first.a || lane.b != first.b || lane.accumulate != first.accumulate)
        emulator::fail("wgmma: the lanes of a warp bring different operands");
      p.c[l] = lane.c;
      registers[l] = lane.registers;
    }
    auto columns = emulator::Operand::decode(first.b, MN_MAJOR);
    if (registers[0]) {
      p.add = [=](float *sums) {
        multiply<Element, K>(sums, N, columns, [&](unsigned r, unsigned k) {
          /* As mma.m16n8k16 has A. */
          unsigned lane = r % 8 * 4 + k % 8 / 2, i = r / 8 + k / 8 * 2;
          return (float)Pair::get(registers[lane][i], k % 2);
        });
      };
    } else {
      auto rows = emulator::Operand::decode(first.a, false);
      unsigned row0 = emulator::this_warp() % 4 * 16;
      p.add = [=](float *sums) {
        multiply<Element, K>(sums, N, columns, [&](unsigned r, unsigned k) { return rows.get<Element>(row0 + r, k); });
      };
    }
    emulator::issue(std::move(p), {first.a, first.b, N * 8 + (int)K / 16 * 2 + MN_MAJOR});
  });
}

#define DSA_WGMMA_16_BITS(type, Pair)                                                                        \
  template <int N, int MN_MAJOR> DSA_DEVICE void dsa_wgmma_##type(float *c, uint64_t a, uint64_t b, int accumulate) { \
    wgmma_of<Half<Pair>, 16, N, MN_MAJOR, Pair>("wgmma." #type, c, a, nullptr, b, accumulate);               \
  }                                                                                                          \
  template <int N, int MN_MAJOR>                                                                             \
  DSA_DEVICE void dsa_wgmma_##type(float *c, const unsigned *a, uint64_t b, int accumulate) {                \
    wgmma_of<Half<Pair>, 16, N, MN_MAJOR, Pair>("wgmma." #type ".registers", c, 0, a, b, accumulate);        \
  }
DSA_WGMMA_16_BITS(bf16, Bf16)
DSA_WGMMA_16_BITS(f16, F16)
template <int N> DSA_DEVICE void dsa_wgmma_e4m3(float *c, uint64_t a, uint64_t b, int accumulate) {
  wgmma_of<Byte, 32, N, 0, Bf16>("wgmma.e4m3", c, a, nullptr, b, accumulate);
}

DSA_DEVICE void dsa_wgmma_fence() {
  emulator::meet("wgmma_fence", nullptr, nullptr,
                 [](const void **, void **) { emulator::wgmma.warps[emulator::this_warp()].fenced = true; });
}
DSA_DEVICE void dsa_wgmma_commit() {
  emulator::meet("wgmma_commit", nullptr, nullptr, [](const void **, void **) { emulator::wgmma_commit(); });
}
template <int PENDING> DSA_DEVICE void dsa_wgmma_wait() {
  emulator::meet("wgmma_wait", nullptr, nullptr, [](const void **, void **) { emulator::wgmma_wait(PENDING); });
}
template <int COUNT> DSA_DEVICE void dsa_wgmma_hold(float *registers) {
  auto &sums = emulator::wgmma.warps[emulator::this_warp()].sums;
  for (auto &[at, s] : sums)
    for (float *c : s.c)
      if (c == registers) emulator::fail("wgmma_hold: sums in the making");
}
template <int COUNT> DSA_DEVICE void dsa_wgmma_hold(unsigned *) {}
template <int COUNT> DSA_DEVICE void dsa_hold_64(int64_t *) {}

template <int SWIZZLE> DSA_DEVICE uint64_t dsa_descriptor(const void *p, int leading, int stride) {
  static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32, "no such swizzle");
  unsigned address = emulator::shared_address(p);
  if (address % 16 || leading % 16 || stride % 16) emulator::fail("descriptor: not multiples of 16");
  uint64_t mode = SWIZZLE == 128 ? 1 : SWIZZLE == 64 ? 2 : 3;
  return mode << 62 | (uint64_t)(stride >> 4 & 0x3FFF) << 32 | (uint64_t)(leading >> 4 & 0x3FFF) << 16 |
         (address & 0x3FFFF) >> 4;
}

template <int N, bool MORE> DSA_DEVICE void set_registers() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "no such number of registers");
  emulator::meet("setmaxnreg", nullptr, nullptr, [](const void **, void **) { emulator::set_registers(N, MORE); });
}
template <int N> DSA_DEVICE void dsa_more_registers() { set_registers<N, true>(); }
template <int N> DSA_DEVICE void dsa_fewer_registers() { set_registers<N, false>(); }
