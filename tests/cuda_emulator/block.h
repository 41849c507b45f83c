/* Runs a block of CUDA threads on the CPU: they are fibers, switched at barriers and warp operations. A thread runs
   until it must wait for another, so each order of threads is one schedule of many; a launch names the order, and a
   kernel that lacks a barrier gives other results in another order. */
#pragma once

#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <vector>

struct dim3 {
  unsigned x, y, z;
};

namespace emulator {

/* Saves the registers that a call preserves, and takes up the other stack where it was left. */
extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

enum State { READY, AT_WARP, AT_BARRIER, DONE };

/* A cp.async on its way: it lands when its group is waited for, or at once in an eager launch. */
struct Copy {
  void *to;
  const void *from;
  int bytes, zero;
};

struct Fiber {
  void *sp;
  char *stack;
  State state;
  dim3 thread;
  int index, barrier;
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

/* What the lanes of a warp brought to the operation that they meet at. */
struct Warp {
  unsigned arrived = 0;
  const char *operation = nullptr;
  const void *in[32];
  void *out[32];
};

struct Options {
  unsigned order; /* 0 ascending, 1 descending, else the seed of a shuffle */
  int eager;      /* cp.async lands at once */
};

struct Machine {
  dim3 grid, block, at;
  Options options;
  int threads, alive;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  struct { int expected, arrived; } barriers[16];
  Fiber *current;
  void *main_sp;
  char *pool, *pool_pages;
  size_t pool_bytes, pool_page_bytes;
  void (*kernel)(void **);
  void **args;
  uint64_t random;
  sigjmp_buf escape;
  char message[512];
};

static Machine m;

constexpr size_t STACK = 64 << 10, PAGE = 4096;

/* Ends the launch with an error, from wherever it is. */
[[noreturn]] inline void fail(const char *format, ...) {
  int used = 0;
  if (m.current)
    used = snprintf(m.message, sizeof m.message, "block (%u, %u, %u) thread %d: ", m.at.x, m.at.y, m.at.z,
                    m.current->index);
  va_list list;
  va_start(list, format);
  vsnprintf(m.message + used, sizeof m.message - used, format, list);
  va_end(list);
  siglongjmp(m.escape, 1);
}

inline void wait_in(State state) {
  m.current->state = state;
  emulator_switch(&m.current->sp, m.main_sp);
}

/* Lanes of the whole warp meet; the last one computes for all with `compute(in, out)`, each lane giving and getting the
   address of its own operands. */
template <typename F> inline void meet(const char *operation, const void *in, void *out, F compute) {
  Warp &w = m.warps[m.current->index / 32];
  int lane = m.current->index % 32;
  if (w.arrived && w.operation != operation)
    fail("the warp meets at %s and at %s", w.operation, operation);
  w.operation = operation;
  w.arrived |= 1u << lane;
  w.in[lane] = in;
  w.out[lane] = out;
  if (w.arrived != 0xFFFFFFFFu) return wait_in(AT_WARP);
  w.arrived = 0;
  compute(w.in, w.out);
  for (int l = 0; l < 32; l++) m.fibers[m.current->index / 32 * 32 + l].state = READY;
}

inline void barrier(int id, int expected) {
  auto &b = m.barriers[id];
  if (b.arrived && b.expected != expected) fail("barrier %d awaits %d and %d threads", id, b.expected, expected);
  b.expected = expected;
  m.current->barrier = id;
  if (++b.arrived < expected) return wait_in(AT_BARRIER);
  b.arrived = 0;
  for (Fiber &f : m.fibers)
    if (f.state == AT_BARRIER && f.barrier == id) f.state = READY;
}

inline void land(const Copy &c) {
  if (c.zero)
    memset(c.to, 0, c.bytes);
  else
    memcpy(c.to, c.from, c.bytes);
}

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
    for (size_t i = order.size(); i > 1; i--) {
      m.random = m.random * 6364136223846793005u + 1442695040888963407u;
      std::swap(order[i - 1], order[(m.random >> 33) % i]);
    }
}

inline void run_block() {
  memset(m.pool_pages, 0xFF, m.pool_page_bytes);
  m.alive = m.threads;
  for (auto &b : m.barriers) b.arrived = 0;
  for (auto &w : m.warps) w.arrived = 0;
  for (int t = 0; t < m.threads; t++) prepare(m.fibers[t], t);
  std::vector<int> warps(m.threads / 32), lanes(32);
  while (m.alive) {
    int ran = 0;
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
    if (!ran) {
      int at_warp = 0, at_barrier = 0;
      const char *operation = "";
      for (Fiber &f : m.fibers) {
        at_warp += f.state == AT_WARP;
        at_barrier += f.state == AT_BARRIER;
        if (f.state == AT_WARP) operation = m.warps[f.index / 32].operation;
      }
      fail("block (%u, %u, %u) hangs: %d threads at a warp operation (%s), %d at a barrier, %d have ended", m.at.x,
           m.at.y, m.at.z, at_warp, operation, at_barrier, m.threads - m.alive);
    }
  }
}

}  // namespace emulator
