/* The arithmetic limit of the machine: multiply-adds in registers, as wide as the target's vectors. Compiled for the
 * target, unlike the other C files. */
#include <omp.h>
#include <stdint.h>

#include "measure.h"

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

/* Enough independent chains to hide the latency of one, and few enough to stay in registers. */
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

/* GFLOP/s of one round. */
static double rate(int threads, int64_t steps) {
  volatile float sink = 0; /* the sums are never looked at, and must be computed all the same */
  int team = 1;
  double start = omp_get_wtime();
#pragma omp parallel num_threads(threads)
  {
    float sum = chains(steps);
#pragma omp critical(dsa_peak)
    sink += sum, team = omp_get_num_threads();
  }
  return 2e-9 * CHAINS * LANES * (double)steps * team / (omp_get_wtime() - start);
}

double dsa_peak(int threads, double seconds) {
  double start = omp_get_wtime(), best = rate(1, 1 << 16);
  /* A twentieth of the time: starting the threads does not count then, and some round is undisturbed. */
  int64_t steps = (int64_t)(best * seconds / (40e-9 * CHAINS * LANES)) + 1;
  while (omp_get_wtime() - start < seconds) {
    double reached = rate(threads, steps);
    if (reached > best) best = reached;
  }
  return best;
}
