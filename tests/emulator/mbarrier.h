/* Barriers in shared memory, and what arrives at them later. Asynchronous work lands when no thread can go on without it,
   or at once in an eager launch; where the order of threads is random, some does this and some that. */
#pragma once

#include "block.h"

namespace emulator {

/* The address that an instruction is given: shared memory begins behind 1 KiB of the system's. */
inline unsigned shared_address(const void *p) {
  long offset = (const char *)p - m.pool;
  if (offset < 0 || offset >= (long)m.pool_bytes) fail("%p does not lie in shared memory", p);
  return (unsigned)offset + 1024;
}

inline void asynchronously(std::function<void()> work) {
  if (at_once())
    work();
  else
    m.on_the_way.push_back(std::move(work));
}

inline Mbarrier &mbarrier_at(const void *p) {
  auto found = m.mbarriers.find((const char *)p);
  if (found == m.mbarriers.end()) fail("no mbarrier was initialized at %#x", shared_address(p));
  return found->second;
}

inline void mbarrier_init(void *p, int count) {
  if (shared_address(p) % 8) fail("mbarrier at %#x is not aligned to 8", shared_address(p));
  if (count < 1) fail("mbarrier at %#x of %d arrivals", shared_address(p), count);
  m.mbarriers[(const char *)p] = {count, count, 0, 0, false};
}

/* A phase may have ended. */
inline void mbarrier_turn(Mbarrier &b, const void *p) {
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  b.phase++;
  for (Fiber &f : m.fibers)
    if (f.state == AT_MBARRIER && f.mbarrier == p) f.state = READY;
  pause();
}

inline void mbarrier_bytes(void *p, int bytes) {
  Mbarrier &b = mbarrier_at(p);
  if (!b.fenced) fail("mbarrier at %#x was not fenced since it was initialized", shared_address(p));
  b.bytes += bytes;
}

inline void mbarrier_arrive(void *p) {
  Mbarrier &b = mbarrier_at(p);
  if (b.pending == 0) fail("more than %d arrivals in a phase of the mbarrier at %#x", b.count, shared_address(p));
  b.pending--;
  mbarrier_turn(b, p);
}

/* Bytes have come. */
inline void mbarrier_complete(void *p, int bytes) {
  mbarrier_bytes(p, -bytes);
  mbarrier_turn(mbarrier_at(p), p);
}

/* Looks again after every phase: who comes back two phases later waits on, as on the device. */
inline void mbarrier_wait(void *p, int parity) {
  if (parity != 0 && parity != 1) fail("mbarrier at %#x: parity %d", shared_address(p), parity);
  while ((mbarrier_at(p).phase & 1) == (unsigned)parity) {
    m.current->mbarrier = (const char *)p;
    m.current->parity = parity;
    wait_in(AT_MBARRIER);
  }
}

/* What ordinary instructions wrote is seen by the asynchronous ones, which read `m.view`. */
inline void publish() {
  for (size_t at = 0; at < m.pool_bytes; at += 4096) {
    size_t bytes = std::min<size_t>(4096, m.pool_bytes - at);
    if (memcmp(m.view.data() + at, m.pool + at, bytes)) memcpy(m.view.data() + at, m.pool + at, bytes);
  }
}

/* An asynchronous instruction writes `bytes` at `offset` of the pool; zeros if `from` is null. */
inline void deliver(unsigned offset, const char *from, int bytes) {
  if (offset + (size_t)bytes > m.pool_bytes) fail("a bulk copy passes the end of shared memory");
  for (char *to : {m.pool + offset, m.view.data() + offset})
    if (from)
      memcpy(to, from, bytes);
    else
      memset(to, 0, bytes);
}

}  // namespace emulator
