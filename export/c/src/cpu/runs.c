/* Whether this CPU runs a kernel set: by its features, and for the tiles of AMX also by what they compute. */
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/arm_features.h"
#include "common/internal.h"
#include "common/x86_level.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#if defined(__x86_64__)
/* Linux gives a process the 8 KiB of tiles only if it asks for them. One thread asks for all, for those that run already
 * too, and what the process forks has the permission as well; exec takes it back. The frame of a signal grows then by
 * the tiles. So Linux refuses if a thread has an alternate signal stack that is too small, and refuses such stacks from
 * then on: AT_MINSIGSTKSZ of getauxval tells how large they must be. */
static int tiles_are_allowed(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
  enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18 };
  return !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA);
#else
  return 0;
#endif
}

/* Tails of everything: heads of two tiles, keys of a block, and entries of a step in bytes. */
enum { QUERIES = 2, HEADS = 33, KEYS = 77, WIDTH = 224 };
struct trial {
  int32_t ks[QUERIES], ke[QUERIES];
  float weights[QUERIES * HEADS], scale, logits[QUERIES * KEYS];
  int8_t numbers[(QUERIES * HEADS + KEYS) * WIDTH]; /* of the queries, then of the keys */
  uint16_t bf16[(QUERIES * HEADS + KEYS) * WIDTH];
};

static dsa_tvm_tensor tensor(void *data, int dtype, int ndim, int64_t *shape) {
  return (dsa_tvm_tensor){.data = data,
                          .device = {CPU_DEVICE, 0},
                          .ndim = ndim,
                          .dtype = {dsa_dtypes[dtype].storage_code, dsa_dtypes[dtype].bits, 1},
                          .shape = shape};
}

static int score(struct trial *t, dsa_kernel kernel, int dtype) {
  const size_t bytes = dsa_dtypes[dtype].bits / 8;
  char *q = dtype == DTYPE_INT8 ? (char *)t->numbers : (char *)t->bf16, *k = q + QUERIES * HEADS * WIDTH * bytes;
  int64_t of_q[] = {QUERIES, HEADS, WIDTH}, of_k[] = {KEYS, WIDTH}, of_weights[] = {QUERIES, HEADS};
  int64_t of_range[] = {QUERIES}, of_scale[] = {1}, of_logits[] = {QUERIES, KEYS};
  dsa_tvm_tensor tensors[] = {tensor(q, dtype, 3, of_q), tensor(k, dtype, 2, of_k),
                              tensor(t->weights, DTYPE_FLOAT32, 2, of_weights),
                              tensor(t->ks, DTYPE_INT32, 1, of_range), tensor(t->ke, DTYPE_INT32, 1, of_range),
                              tensor(&t->scale, DTYPE_FLOAT32, 1, of_scale),
                              tensor(t->logits, DTYPE_FLOAT32, 2, of_logits)};
  const int64_t numbers[] = {0, QUERIES, 0, KEYS, 0, 0}; /* m0, m1, n0, n1, row0, scaled */
  struct tvm_any args[13];
  for (int i = 0; i < 7; i++) args[i] = dsa_arg_tensor(&tensors[i]);
  for (int i = 0; i < 6; i++) args[7 + i] = dsa_arg_int(numbers[i]);
  struct dsa_outcome outcome = {0};
  dsa_call_kernel(&outcome, kernel, args, 13);
  return !outcome.failed;
}

/* Integers, whose sums are exact in whatever order. */
static int is_right(const struct trial *t) {
  for (int m = 0; m < QUERIES; m++)
    for (int n = 0; n < KEYS; n++) {
      int32_t logit = 0;
      for (int h = 0; h < HEADS; h++) {
        const int8_t *q = t->numbers + (m * HEADS + h) * WIDTH, *k = t->numbers + (QUERIES * HEADS + n) * WIDTH;
        int32_t sum = 0;
        for (int d = 0; d < WIDTH; d++) sum += q[d] * k[d];
        logit += sum > 0 ? sum * (int32_t)t->weights[m * HEADS + h] : 0;
      }
      if (t->logits[m * KEYS + n] != (float)logit) return 0;
    }
  return 1;
}

/* Whether the kernels of a set that multiply tiles compute what they should. Tiles that a simulator or a hypervisor gets
 * wrong would give wrong results, and no error. */
static int tiles_compute(const struct kernel_set *set) {
  struct trial *t = calloc(1, sizeof *t);
  int right = t != NULL;
  if (t) {
    uint32_t seed = 1;
    for (int i = 0; i < (QUERIES * HEADS + KEYS) * WIDTH; i++) {
      seed = seed * 1664525u + 1013904223u;
      t->numbers[i] = (int8_t)((int)(seed >> 24) % 15 - 7);
      const float number = t->numbers[i];
      uint32_t bits;
      memcpy(&bits, &number, sizeof bits);
      t->bf16[i] = (uint16_t)(bits >> 16);
    }
    for (int i = 0; i < QUERIES * HEADS; i++) t->weights[i] = (float)(i % 5 - 2);
    for (int m = 0; m < QUERIES; m++) t->ke[m] = KEYS;
  }
  for (const struct indexer_kernel *row = set->indexer; right; row++) {
    const int dtypes[] = {DTYPE_BFLOAT16, DTYPE_INT8};
    for (int i = 0; right && i < 2; i++) {
      dsa_kernel kernel = row->entry[dtypes[i]][dtypes[i]];
      if (!kernel) continue;
      memset(t->logits, 0xff, sizeof t->logits);
      right = score(t, kernel, dtypes[i]) && is_right(t);
    }
    if (row->last) break;
  }
  free(t);
  return right;
}
#endif

int dsa_cpu_runs(const struct kernel_set *set) {
#if defined(__x86_64__)
  const struct x86_features features = x86_features_here();
  if (!set->level || set->level > x86_level(&features) || !x86_has(x86_dots(&features), set->dots)) return 0;
  return !(set->dots & X86_AMX_TILE) || (tiles_are_allowed() && tiles_compute(set));
#elif defined(__aarch64__)
  return !set->level && !(set->dots & ~arm_dots(getauxval(AT_HWCAP), getauxval(AT_HWCAP2)));
#else
  (void)set;
  return 0;
#endif
}
