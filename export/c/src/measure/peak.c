/* Measures the arithmetic limit of the machine with multiply-adds in registers. Unlike the other C files, this one is
 * compiled for the target, so its vectors are as wide as the target's. */
#include <stdint.h>
#include <time.h>

#include "common/internal.h"
#include "measure/measure.h"

#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, CHAINS = 24 };
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, CHAINS = 12 };
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, CHAINS = 24 };
#else
enum { VECTOR_BYTES = 16, CHAINS = 12 };
#endif
typedef float vector __attribute__((vector_size(VECTOR_BYTES)));
enum { LANES = VECTOR_BYTES / sizeof(float) };

/* Enough independent chains to hide the latency of a multiply-add, and few enough to stay in registers. */
static float chains(int64_t steps) {
  const vector factor = (vector){0} + 0.999f, term = (vector){0} + 0.001f;
  vector sum[CHAINS];
#pragma GCC unroll 32
  for (int i = 0; i < CHAINS; i++) sum[i] = (vector){0} + (float)i;
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 32
    for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * factor + term;
  }
#pragma GCC unroll 32
  for (int i = 1; i < CHAINS; i++) sum[0] += sum[i];
  return sum[0][0];
}

static double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static void task(void *arg, int64_t index) {
  volatile float sum = chains(*(int64_t *)arg); /* volatile: computed although nobody reads it */
  (void)sum, (void)index;
}

/* The GFLOP/s of one round. */
static double rate(int threads, int64_t steps) {
  const struct dsa_executor executor = dsa_pool_executor(threads);
  double start = seconds_now();
  dsa_parallel_for(&executor, threads, threads, task, &steps);
  return 2e-9 * CHAINS * LANES * (double)steps * threads / (seconds_now() - start);
}

double dsa_peak(int threads, double seconds) {
  double start = seconds_now(), best = rate(1, 1 << 16);
  /* A round takes a twentieth of the time: long enough to start the threads, and some round is undisturbed. */
  int64_t steps = (int64_t)(best * seconds / (40e-9 * CHAINS * LANES)) + 1;
  while (seconds_now() - start < seconds) {
    double reached = rate(threads, steps);
    if (reached > best) best = reached;
  }
  return best;
}
