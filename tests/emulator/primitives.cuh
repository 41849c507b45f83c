/* The model of schedules/cuda/headers/primitives.cuh: the same functions, of which each does on the CPU what the
   instruction does, and fails where the instruction would be undefined. */
#pragma once

#include <cmath>
#include <set>

#include "mma.h"

typedef unsigned char uchar;
#define CUDART_INF_F __builtin_inff()

using std::max;
using std::min;

#define DSA_DEVICE static inline
#define DSA_SHARED_POOL(name) uchar *name = (uchar *)emulator::m.pool

#define DSA_EXPECT_ALIGNED(p, bytes) \
  if ((uintptr_t)(p) % (bytes)) emulator::fail("%s: %p is not aligned to %d", __func__, (const void *)(p), (int)(bytes))

DSA_DEVICE unsigned dsa_ballot(int predicate) {
  unsigned votes;
  emulator::meet("ballot", &predicate, &votes, [](const void **in, void **out) {
    unsigned all = 0;
    for (int l = 0; l < 32; l++) all |= (unsigned)(*own<int>(in[l]) != 0) << l;
    for (int l = 0; l < 32; l++) *(unsigned *)out[l] = all;
  });
  return votes;
}

template <typename T> struct Shuffled {
  T x;
  int lane;
};

/* Each lane gets the value of the lane that it names. */
template <typename T> DSA_DEVICE T shuffle_from(const char *operation, T x, int lane) {
  Shuffled<T> in = {x, lane};
  T result;
  emulator::meet(operation, &in, &result, [](const void **in, void **out) {
    for (int l = 0; l < 32; l++) *(T *)out[l] = own<Shuffled<T>>(in[own<Shuffled<T>>(in[l])->lane & 31])->x;
  });
  return result;
}
DSA_DEVICE int dsa_lane() { return emulator::m.current->index % 32; }
template <typename T> DSA_DEVICE T dsa_shuffle(T x, int lane) { return shuffle_from("shuffle", x, lane); }
template <typename T> DSA_DEVICE T dsa_shuffle_xor(T x, int mask) {
  return shuffle_from("shuffle_xor", x, dsa_lane() ^ mask);
}
template <typename T> DSA_DEVICE T dsa_shuffle_up(T x, int delta) {
  return shuffle_from("shuffle_up", x, dsa_lane() < delta ? dsa_lane() : dsa_lane() - delta);
}

DSA_DEVICE int dsa_count_bits(unsigned x) { return __builtin_popcount(x); }

DSA_DEVICE int dsa_atomic_add(int *p, int x) {
  int old = *p;
  *p = old + x;
  return old;
}

DSA_DEVICE void dsa_barrier(int id, int threads) { emulator::barrier(id, threads); }

DSA_DEVICE void dsa_load_128(void *to, const void *from) {
  DSA_EXPECT_ALIGNED(from, 16);
  memcpy(to, from, 16);
}

DSA_DEVICE void cp_async(void *to, const void *from, int bytes, int valid) {
  DSA_EXPECT_ALIGNED(to, bytes);
  DSA_EXPECT_ALIGNED(from, bytes);
  emulator::Copy copy = {to, from, bytes, !valid};
  if (emulator::m.options.eager)
    emulator::land(copy);
  else
    emulator::m.current->open.push_back(copy);
}
DSA_DEVICE void dsa_cp_async_16(void *to, const void *from, int valid) { cp_async(to, from, 16, valid); }
DSA_DEVICE void dsa_cp_async_4(void *to, const void *from, int valid) { cp_async(to, from, 4, valid); }

DSA_DEVICE void dsa_cp_async_commit() {
  emulator::Fiber &f = *emulator::m.current;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}

DSA_DEVICE void dsa_cp_async_wait(int pending) {
  auto &groups = emulator::m.current->groups;
  if (pending < 0 || pending > 7) emulator::fail("cp_async_wait: %d is not in 0..7", pending);
  size_t landing = groups.size() > (size_t)pending ? groups.size() - pending : 0;
  for (size_t g = 0; g < landing; g++)
    for (const auto &copy : groups[g]) emulator::land(copy);
  groups.erase(groups.begin(), groups.begin() + landing);
}

/* 8 rows of 16 bytes are loaded at once, but those that have the same banks and are not the same one after the other. */
DSA_DEVICE void count_conflicts(const void *const *rows) {
  std::set<uintptr_t> of[8];
  size_t passes = 1;
  for (int i = 0; i < 8; i++) of[(uintptr_t)rows[i] / 16 % 8].insert((uintptr_t)rows[i]);
  for (const auto &same : of) passes = max(passes, same.size());
  emulator::m.conflicts += passes - 1;
}

DSA_DEVICE void ldmatrix(const char *operation, unsigned *r, const void *row, int transposed) {
  DSA_EXPECT_ALIGNED(row, 16);
  struct {
    const uint16_t *row;
    int transposed;
  } in = {(const uint16_t *)row, transposed};
  using In = decltype(in);
  emulator::meet(operation, &in, r, [](const void **in, void **out) {
    unsigned got[32][4];
    const void *rows[32];
    for (int l = 0; l < 32; l++) rows[l] = own<In>(in[l])->row;
    for (int i = 0; i < 4; i++) count_conflicts(rows + 8 * i);
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) {
        auto element = [&](int r, int c) { return (unsigned)own<In>(in[8 * i + r])->row[c]; };
        int major = l / 4, minor = l % 4 * 2;
        got[l][i] = own<In>(in[l])->transposed ? element(minor, major) | element(minor + 1, major) << 16
                                               : element(major, minor) | element(major, minor + 1) << 16;
      }
    for (int l = 0; l < 32; l++) memcpy(out[l], got[l], sizeof got[l]);
  });
}
DSA_DEVICE void dsa_ldmatrix_x4(unsigned *r, const void *row) { ldmatrix("ldmatrix", r, row, 0); }
DSA_DEVICE void dsa_ldmatrix_x4_trans(unsigned *r, const void *row) { ldmatrix("ldmatrix.trans", r, row, 1); }

DSA_DEVICE void dsa_mma_bf16(float *c, const unsigned *a, const unsigned *b) { mma<Bf16>("mma.bf16", c, a, b); }
DSA_DEVICE void dsa_mma_f16(float *c, const unsigned *a, const unsigned *b) { mma<F16>("mma.f16", c, a, b); }
DSA_DEVICE void dsa_mma_e4m3(float *c, const unsigned *a, const unsigned *b) { mma<E4m3>("mma.e4m3", c, a, b); }
DSA_DEVICE void dsa_mma_s8(int *c, const unsigned *a, const unsigned *b) { mma<S8>("mma.s8", c, a, b); }

DSA_DEVICE unsigned bf16_bits(float x) {
  unsigned b;
  memcpy(&b, &x, 4);
  return x != x ? 0x7FFF : (b + 0x7FFF + (b >> 16 & 1)) >> 16;
}
DSA_DEVICE unsigned f16_bits(float x) {
  _Float16 h = (_Float16)x;
  uint16_t b;
  memcpy(&b, &h, 2);
  return x != x ? 0x7FFF : b;
}
DSA_DEVICE unsigned dsa_pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
DSA_DEVICE unsigned dsa_pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }
DSA_DEVICE float dsa_f16_to_f32(unsigned short x) { return F16::get(x, 0); }
DSA_DEVICE unsigned dsa_mul_f16x2(unsigned a, unsigned b) {
  return f16_bits(F16::get(a, 0) * F16::get(b, 0)) | f16_bits(F16::get(a, 1) * F16::get(b, 1)) << 16;
}

DSA_DEVICE float dsa_exp2(float x) {
  float y = exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}

DSA_DEVICE float dsa_max_nan(float x, float y) { return x != x || y != y ? NAN : x > y ? x : y; }

DSA_DEVICE unsigned dsa_mul_bf16x2(unsigned a, unsigned b) {
  return bf16_bits(Bf16::get(a, 0) * Bf16::get(b, 0)) | bf16_bits(Bf16::get(a, 1) * Bf16::get(b, 1)) << 16;
}

/* Three barriers: around the clearing of the votes, and behind the last one. */
DSA_DEVICE int dsa_barrier_or(int predicate) {
  static int votes;
  dsa_barrier(0, emulator::m.threads);
  if (emulator::m.current->index == 0) votes = 0;
  dsa_barrier(0, emulator::m.threads);
  votes |= predicate != 0;
  dsa_barrier(0, emulator::m.threads);
  return votes;
}

DSA_DEVICE float dsa_reciprocal(float x) {
  float y = 1 / (std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
}
