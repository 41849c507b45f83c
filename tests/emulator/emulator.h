/* What a CUDA kernel finds declared, and how it is launched: its blocks run one after the other. */
#pragma once

#include <signal.h>
#include <sys/mman.h>

#include "run.h"

namespace emulator {

inline void on_fault(int, siginfo_t *info, void *) { fail("access to address %p", info->si_addr); }

/* The pool ends where a page begins that cannot be touched. */
inline void allocate(size_t shared_bytes) {
  m.pool_bytes = (shared_bytes + 127) / 128 * 128;
  m.pool_page_bytes = (m.pool_bytes + PAGE - 1) / PAGE * PAGE;
  char *p = (char *)mmap(nullptr, m.pool_page_bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  m.pool_pages = p + PAGE;
  mprotect(m.pool_pages, m.pool_page_bytes, PROT_READ | PROT_WRITE);
  m.pool = m.pool_pages + m.pool_page_bytes - m.pool_bytes;
  m.fibers.resize(m.threads);
  m.warps.assign(m.threads / 32, Warp());
  for (Fiber &f : m.fibers) {
    f.stack = (char *)mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    mprotect(f.stack, PAGE, PROT_NONE);
    f.stack += PAGE;
  }
}

inline void release() {
  munmap(m.pool_pages - PAGE, m.pool_page_bytes + 2 * PAGE);
  for (Fiber &f : m.fibers) munmap(f.stack - PAGE, STACK + PAGE);
  m.fibers.clear();
}

}  // namespace emulator

/* Launches one kernel; a message where it failed, else NULL. */
extern "C" const char *emulator_launch(void (*kernel)(void **), void **args, const unsigned *grid,
                                       const unsigned *block, size_t shared_bytes, unsigned order, int eager,
                                       int sum_bits) {
  using namespace emulator;
  m.kernel = kernel;
  m.args = args;
  m.grid = {grid[0], grid[1], grid[2]};
  m.block = {block[0], block[1], block[2]};
  m.options = {order, eager, sum_bits};
  m.random = order;
  m.conflicts = 0;
  m.threads = (int)(block[0] * block[1] * block[2]);
  m.message[0] = 0;
  m.current = nullptr;
  allocate(shared_bytes);
  static char signal_stack[64 << 10];
  stack_t other = {}, old_stack;
  other.ss_sp = signal_stack;
  other.ss_size = sizeof signal_stack;
  sigaltstack(&other, &old_stack);
  struct sigaction action = {}, old_segv, old_bus;
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  if (!sigsetjmp(m.escape, 1)) {
    for (m.at.z = 0; m.at.z < grid[2]; m.at.z++)
      for (m.at.y = 0; m.at.y < grid[1]; m.at.y++)
        for (m.at.x = 0; m.at.x < grid[0]; m.at.x++) run_block();
  }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
  release();
  return m.message[0] ? m.message : nullptr;
}

/* Of the last launch. */
extern "C" unsigned long emulator_conflicts() { return emulator::m.conflicts; }

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (emulator::m.current->thread)
#define blockIdx (emulator::m.at)
#define gridDim (emulator::m.grid)
#define blockDim (emulator::m.block)

inline void __syncthreads() { emulator::barrier(0, emulator::m.threads); }
inline void __syncwarp() {
  emulator::meet("__syncwarp", nullptr, nullptr, [](const void **, void **) {});
}
inline void __threadfence() {}
