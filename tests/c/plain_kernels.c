/* Kernels of float32 in plain C, which a sanitizer can watch: each reads and writes what it is told to, and no more. */
#include <math.h>
#include <stdlib.h>

#include "common/internal.h"

/* As TVM's code declares them: the library offers the services behind these pointers. */
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
int (*__TVMBackendFreeWorkspace)(int, int, void *);

#define KERNEL(name) int __tvm_ffi_##name(void *self, const struct tvm_any *args, int32_t n, struct tvm_any *result)

static const dsa_tvm_tensor *tensor(const struct tvm_any *any) { return any->value.p; }

static void *row_of(const struct tvm_any *any, int64_t row) {
  int64_t length = 1;
  for (int i = 1; i < tensor(any)->ndim; i++) length *= tensor(any)->shape[i];
  return (float *)tensor(any)->data + row * length;
}

static float product(const float *a, const float *b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

KERNEL(plain_indexer) {
  (void)self, (void)n, (void)result;
  int64_t m0 = args[7].value.i, m1 = args[8].value.i, n0 = args[9].value.i, n1 = args[10].value.i;
  int64_t heads = tensor(&args[0])->shape[1], width = tensor(&args[0])->shape[2];
  for (int64_t m = m0; m < m1; m++) {
    const float *q = row_of(&args[0], m), *weights = row_of(&args[2], m);
    int32_t ks = *(int32_t *)row_of(&args[3], m), ke = *(int32_t *)row_of(&args[4], m);
    float *logits = row_of(&args[6], args[11].value.i + m - m0);
    for (int64_t key = n0; key < n1; key++) {
      float sum = 0;
      for (int64_t h = 0; h < heads; h++) {
        float score = product(q + h * width, row_of(&args[1], key), width);
        sum += weights[h] * (score > 0 ? score : 0);
      }
      if (args[12].value.i) sum *= *(float *)row_of(&args[5], key);
      logits[key] = ks <= key && key < ke ? sum : -INFINITY;
    }
  }
  return 0;
}

KERNEL(plain_topk) {
  (void)self, (void)n, (void)result;
  int64_t topk = tensor(&args[3])->shape[1], s_kv = tensor(&args[0])->shape[1];
  for (int64_t m = args[4].value.i; m < args[5].value.i; m++) {
    const float *logits = row_of(&args[0], args[6].value.i + m - args[4].value.i);
    int32_t *indices = row_of(&args[3], args[7].value.i + m - args[4].value.i);
    int64_t ks = *(int32_t *)row_of(&args[1], m), ke = *(int32_t *)row_of(&args[2], m), found = 0;
    ks = ks > 0 ? ks : 0;
    ke = ke < s_kv ? ke : s_kv;
    for (int64_t i = ks; i < ke; i++) {
      int64_t before = 0;
      for (int64_t j = ks; j < ke; j++) before += logits[j] > logits[i] || (logits[j] == logits[i] && j < i);
      if (before < topk) indices[found++] = (int32_t)i;
    }
    while (found < topk) indices[found++] = -1;
  }
  return 0;
}

KERNEL(plain_mla) {
  (void)self, (void)n, (void)result;
  int64_t m = args[8].value.i, row = args[11].value.i, topk = tensor(&args[2])->shape[1];
  int64_t heads = tensor(&args[0])->shape[1], d_qk = tensor(&args[0])->shape[2], d_v = tensor(&args[5])->shape[2];
  int64_t count = args[14].value.i ? *(int32_t *)row_of(&args[4], m) : topk, s_kv = tensor(&args[1])->shape[0];
  const int32_t *indices = row_of(&args[2], row);
  float *scores = __TVMBackendAllocWorkspace(1, 0, (uint64_t)topk * sizeof *scores, 2, 32);
  if (!scores) return -1;
  for (int64_t h = args[9].value.i; h < args[10].value.i; h++) {
    const float *q = (float *)row_of(&args[0], m) + h * d_qk;
    float *out = (float *)row_of(&args[5], m) + h * d_v, most = -INFINITY, sum = 0;
    for (int64_t i = 0; i < topk; i++) {
      int valid = i < count && indices[i] >= 0 && indices[i] < s_kv;
      scores[i] = valid ? (float)args[12].value.f * product(q, row_of(&args[1], indices[i]), d_qk) : -INFINITY;
      if (scores[i] > most) most = scores[i];
    }
    for (int64_t d = 0; d < d_v; d++) out[d] = 0;
    for (int64_t i = 0; i < topk; i++) {
      if (scores[i] == -INFINITY) continue;
      float weight = expf(scores[i] - most);
      sum += weight;
      for (int64_t d = 0; d < d_v; d++) out[d] += weight * ((float *)row_of(&args[1], indices[i]))[d];
    }
    float sink = args[13].value.i ? expf(((float *)tensor(&args[3])->data)[h] - most) : 0;
    for (int64_t d = 0; d < d_v && sum > 0; d++) out[d] /= sum + sink;
    ((float *)row_of(&args[6], row))[h] = most;
    ((float *)row_of(&args[7], m))[h] = sum > 0 ? most + logf(sum) : INFINITY;
  }
  (void)heads;
  return __TVMBackendFreeWorkspace(1, 0, scores);
}
