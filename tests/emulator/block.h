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
#include <functional>
#include <map>
#include <string>
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

enum State { READY, PAUSED, AT_WARP, AT_BARRIER, AT_MBARRIER, DONE };

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
  const char *mbarrier;
  int parity;
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

/* A barrier in shared memory: the arrivals and the bytes that its phase still waits for. */
struct Mbarrier {
  int count, pending;
  long bytes;
  unsigned phase;
  bool fenced;
};

struct Options {
  unsigned order; /* 0 ascending, 1 descending, else the seed of a shuffle */
  int eager;      /* cp.async lands at once */
  int sum_bits;   /* binary places that tensor cores' sums keep behind the leading one; 0: sums of f32, rounded */
};

struct Machine {
  dim3 grid, block, at;
  Options options;
  int threads, alive, resident; /* blocks of a multiprocessor, by the launch bounds */
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  struct { int expected, arrived; } barriers[16];
  std::map<const char *, Mbarrier> mbarriers;
  std::vector<std::function<void()>> on_the_way; /* what arrives at mbarriers */
  std::vector<char> view;                        /* shared memory as asynchronous instructions see it */
  std::vector<std::function<void()>> at_start;   /* of each block */
  Fiber *current;
  void *main_sp;
  char *pool, *pool_pages;
  size_t pool_bytes, pool_page_bytes;
  void (*kernel)(void **);
  void **args;
  uint64_t random;
  unsigned long conflicts; /* bank conflicts of ldmatrix: passes beside the first of 8 rows */
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

/* Lets those run first who were just woken. */
inline void pause() {
  if (m.current) wait_in(PAUSED);
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

/* Whether this arrival is the last one; it wakes those who wait. */
inline bool barrier_arrive(int id, int expected) {
  auto &b = m.barriers[id];
  if (b.arrived && b.expected != expected) fail("barrier %d awaits %d and %d threads", id, b.expected, expected);
  b.expected = expected;
  if (++b.arrived < expected) return false;
  b.arrived = 0;
  for (Fiber &f : m.fibers)
    if (f.state == AT_BARRIER && f.barrier == id) f.state = READY;
  return true;
}

inline void barrier(int id, int expected) {
  m.current->barrier = id;
  if (!barrier_arrive(id, expected)) wait_in(AT_BARRIER);
}

inline void land(const Copy &c) {
  if (c.zero)
    memset(c.to, 0, c.bytes);
  else
    memcpy(c.to, c.from, c.bytes);
}

inline size_t random_below(size_t n) {
  m.random = m.random * 6364136223846793005u + 1442695040888963407u;
  return (m.random >> 33) % n;
}

/* Whether asynchronous work is done as soon as it is known; where the order of threads is random, some is and some not. */
inline bool at_once() {
  if (m.options.order <= 1) return m.options.eager;
  return m.options.eager ? random_below(4) != 0 : random_below(4) == 0;
}

}  // namespace emulator
