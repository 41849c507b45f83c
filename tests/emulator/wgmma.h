/* The model of products of warpgroups. Each warp makes its 16 rows. Sums are hidden between the product and the wait: what
   is there is NaN, and what is written there is lost. Operands are read at the wait, or at once in an eager launch, or either in a random order. */
#pragma once

#include <array>

#include "mbarrier.h"

namespace emulator {

/* An operand in shared memory: rows of 16 bytes of an index, as a descriptor says. */
struct Operand {
  unsigned start, leading, stride, span;
  bool mn_major;

  static Operand decode(uint64_t descriptor, bool mn_major) {
    static const unsigned SPANS[] = {0, 128, 64, 32};
    Operand o = {unsigned(descriptor & 0x3FFF) << 4, unsigned(descriptor >> 16 & 0x3FFF) << 4,
                 unsigned(descriptor >> 32 & 0x3FFF) << 4, SPANS[descriptor >> 62], mn_major};
    if (!o.span) fail("wgmma: a descriptor without a swizzle is not modelled");
    if (descriptor >> 49 & 7) fail("wgmma: a base offset is not modelled");
    if (o.start % (8 * o.span) >= o.span) fail("wgmma: an operand at %#x begins within a pattern of 8 rows", o.start);
    if (!mn_major && o.start % o.span + 32 > o.span) fail("wgmma: an operand at %#x passes the end of its rows", o.start);
    return o;
  }

  /* Where element (index, k) of `bytes` bytes lies. The pattern counts from multiples of 8 spans on. */
  unsigned address(unsigned index, unsigned k, unsigned bytes) const {
    unsigned at = start, per_row = span / bytes;
    if (mn_major)
      at += index / per_row * leading + index % per_row * bytes + k / 8 * stride + k % 8 * span;
    else
      at += index / 8 * stride + index % 8 * span + k * bytes;
    return at ^ (at >> 7 & (span / 16 - 1)) << 4;
  }

  template <typename Element> float get(unsigned index, unsigned k) const {
    unsigned at = address(index, k, Element::BYTES);
    if (at < 1024 || at - 1024 + Element::BYTES > m.pool_bytes) fail("wgmma reads shared memory at %#x", at);
    return Element::get(m.view.data() + at - 1024);
  }
};

/* One warp's part of a product. */
struct Product {
  int n;
  float *c[32];
  bool accumulate, done;
  std::function<void(float *sums)> add; /* to 16 x n */
};

/* Sums in the making, by the registers of the warp's first lane. */
struct Sums {
  int n, pending;
  bool all_done;
  float *c[32];
  std::vector<float> value; /* 16 x n */
};

struct Products {
  std::vector<std::vector<Product>> groups;
  std::vector<Product> open;
  std::map<float *, Sums> sums;
  bool fenced;
  size_t issued;
};

struct Issue {
  uint64_t a, b;
  int kind;
};

struct Wgmma {
  std::vector<Products> warps;
  std::vector<std::vector<Issue>> issued; /* by warpgroup: all its warps must issue the same */
  std::vector<int> registers;             /* by warpgroup, of a thread; 0 unknown */
};
static Wgmma wgmma;
static const bool wgmma_known = [] {
  m.at_start.push_back([] {
    wgmma.warps.assign(m.threads / 32, Products());
    wgmma.issued.assign((m.threads + 127) / 128, {});
    wgmma.registers.assign((m.threads + 127) / 128, 0);
  });
  return true;
}();

inline int this_warp() { return m.current->index / 32; }

/* Lane `l`'s register `i` of a sum, as row and column of the warp's 16 x n. */
inline size_t place_of(int l, int i, int n) { return (l / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + l % 4 * 2 + i % 2; }

inline void finish(Products &warp, const Product &p) {
  Sums &s = warp.sums.at(p.c[0]);
  if (!p.accumulate) std::fill(s.value.begin(), s.value.end(), 0.f);
  p.add(s.value.data());
}

inline void show(Products &warp, const Product &p) {
  Sums &s = warp.sums.at(p.c[0]);
  if (--s.pending) return;
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < s.n / 2; i++) s.c[l][i] = s.value[place_of(l, i, s.n)];
  warp.sums.erase(p.c[0]);
}

inline void issue(Product p, const Issue &what) {
  Products &warp = wgmma.warps[this_warp()];
  if (!warp.fenced) fail("wgmma without a wgmma_fence behind the last wait");
  auto &issued = wgmma.issued[this_warp() / 4];
  if (warp.issued == issued.size()) issued.push_back(what);
  const Issue &others = issued[warp.issued++];
  if (others.b != what.b || others.a != what.a || others.kind != what.kind)
    fail("wgmma: the warps of a warpgroup issue different products");
  auto known = warp.sums.find(p.c[0]);
  if (known == warp.sums.end()) {
    for (auto &[at, s] : warp.sums)
      if (at < p.c[0] + p.n / 2 && p.c[0] < at + s.n / 2) fail("wgmma: sums overlap others in the making");
    Sums s = {p.n, 0, true, {}, std::vector<float>(16 * p.n)};
    for (int l = 0; l < 32; l++) {
      s.c[l] = p.c[l];
      for (int i = 0; i < p.n / 2; i++) s.value[place_of(l, i, p.n)] = p.c[l][i];
      memset(p.c[l], 0xFF, p.n / 2 * sizeof(float));
    }
    known = warp.sums.emplace(p.c[0], s).first;
  }
  if (known->second.n != p.n) fail("wgmma: sums of another shape in the making");
  known->second.pending++;
  /* What comes later on the same sums is not before. */
  p.done = known->second.all_done && at_once();
  known->second.all_done = p.done;
  if (p.done) finish(warp, p);
  warp.open.push_back(std::move(p));
}

inline void wgmma_commit() {
  Products &warp = wgmma.warps[this_warp()];
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}

inline void wgmma_wait(size_t pending) {
  Products &warp = wgmma.warps[this_warp()];
  warp.fenced = false;
  size_t done = warp.groups.size() > pending ? warp.groups.size() - pending : 0;
  for (size_t g = 0; g < done; g++)
    for (const Product &p : warp.groups[g]) {
      if (!p.done) finish(warp, p);
      show(warp, p);
    }
  warp.groups.erase(warp.groups.begin(), warp.groups.begin() + done);
}

/* `setmaxnreg`: the warpgroups share what the block was given at its launch, which is what it could have beside as many
   others as its launch bounds say. A group that asks waits for others to give, so only what they end with is wrong; those
   that have not said may give most. */
inline void set_registers(int n, bool more) {
  int &own = wgmma.registers[this_warp() / 4], given = std::min(255, 65536 / (m.threads * m.resident)) / 8 * 8;
  int before = own ? own : given, sum = 0;
  if (more ? n < before : n > before) fail("setmaxnreg: %s, but from %d to %d registers", more ? "inc" : "dec", before, n);
  own = n;
  for (int r : wgmma.registers) sum += r ? r : 24;
  given *= (int)wgmma.registers.size();
  if (sum > given) fail("setmaxnreg: %d registers, of %d", sum * 128, given * 128);
}

}  // namespace emulator
