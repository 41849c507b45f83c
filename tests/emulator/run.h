/* Runs the fibers of a block to their end, in the order that the launch asks for, and says who waits where none can go on. */
#pragma once

#include "block.h"

namespace emulator {

inline void run_fiber() {
  m.kernel(m.args);
  m.alive--;
  wait_in(DONE);
}

inline void prepare(Fiber &f, int index) {
  f.state = READY;
  f.index = index;
  f.thread = {index % m.block.x, index / m.block.x % m.block.y, index / m.block.x / m.block.y};
  f.groups.clear();
  f.open.clear();
  void **top = (void **)(f.stack + STACK);
  *--top = nullptr; /* where run_fiber would return to; also aligns its stack as a call does */
  *--top = (void *)run_fiber;
  f.sp = top - 6;
}

inline void permute(std::vector<int> &order) {
  for (size_t i = 0; i < order.size(); i++) order[i] = m.options.order == 1 ? (int)(order.size() - 1 - i) : (int)i;
  if (m.options.order > 1)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_below(i)]);
}

/* Asynchronous work has no order: the first, the last or any of it is done next. */
inline bool land_one() {
  auto &all = m.on_the_way;
  if (all.empty()) return false;
  auto next = all.begin() + (m.options.order == 0 ? 0 : m.options.order == 1 ? all.size() - 1 : random_below(all.size()));
  auto work = std::move(*next);
  all.erase(next);
  work();
  return true;
}

[[noreturn]] inline void hang() {
  int at_warp = 0, at_barrier = 0;
  const char *operation = "";
  std::map<std::pair<const char *, int>, int> waiting;
  for (Fiber &f : m.fibers) {
    at_warp += f.state == AT_WARP;
    at_barrier += f.state == AT_BARRIER;
    if (f.state == AT_WARP) operation = m.warps[f.index / 32].operation;
    if (f.state == AT_MBARRIER) waiting[{f.mbarrier, f.parity}]++;
  }
  std::string text;
  for (auto &[wait, threads] : waiting) {
    const Mbarrier &b = m.mbarriers[wait.first];
    int first = 0;
    while (m.fibers[first].state != AT_MBARRIER || m.fibers[first].mbarrier != wait.first) first++;
    char line[200];
    snprintf(line, sizeof line,
             "; %d threads from %d on at the mbarrier at byte %d for parity %d: phase %u lacks %d of %d arrivals, %ld bytes",
             threads, first, (int)(wait.first - m.pool), wait.second, b.phase, b.pending, b.count, b.bytes);
    text += line;
  }
  fail("block (%u, %u, %u) hangs: %d threads at a warp operation (%s), %d at a barrier, %d have ended%s", m.at.x, m.at.y,
       m.at.z, at_warp, operation, at_barrier, m.threads - m.alive, text.c_str());
}

inline void run_block() {
  memset(m.pool_pages, 0xFF, m.pool_page_bytes);
  m.view.assign(m.pool_bytes, (char)0xFF);
  m.mbarriers.clear();
  m.on_the_way.clear();
  for (auto &prepare_more : m.at_start) prepare_more();
  m.alive = m.threads;
  for (auto &b : m.barriers) b.arrived = 0;
  for (auto &w : m.warps) w.arrived = 0;
  for (int t = 0; t < m.threads; t++) prepare(m.fibers[t], t);
  std::vector<int> warps(m.threads / 32), lanes(32);
  while (m.alive) {
    int ran = 0;
    for (Fiber &f : m.fibers)
      if (f.state == PAUSED) f.state = READY;
    permute(warps);
    for (int w : warps) {
      permute(lanes);
      /* Until the warp is done or waits as a whole: its operations are many, barriers are few. */
      for (int before = -1; before != ran;) {
        before = ran;
        for (int l : lanes) {
          Fiber &f = m.fibers[w * 32 + l];
          if (f.state != READY) continue;
          m.current = &f;
          emulator_switch(&m.main_sp, f.sp);
          ran++;
        }
      }
    }
    m.current = nullptr;
    if (m.options.order > 1 && random_below(4) == 0) ran += land_one();
    if (!ran && !land_one()) hang();
  }
  if (!m.on_the_way.empty()) fail("block (%u, %u, %u) ended before %zu bulk copies", m.at.x, m.at.y, m.at.z, m.on_the_way.size());
}

}  // namespace emulator
