/* What an application does: one query of sparse attention over a small cache, checked by hand. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dsa_tvm/dsa_tvm.h"

enum { S_KV = 200, H_IDX = 4, D_IDX = 64, H_Q = 8, D_QK = 576, D_V = 512, TOPK = 16 };

static dsa_tvm_tensor tensor(void *data, uint8_t code, int64_t *shape, int ndim) {
  dsa_tvm_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = 1;
  t.ndim = ndim;
  t.dtype.code = code;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

static float *numbers(int n) {
  float *x = malloc((size_t)n * sizeof(float));
  int i;
  for (i = 0; i < n; i++) x[i] = (float)rand() / (float)RAND_MAX - 0.5f;
  return x;
}

static int expect(int got, int wanted) {
  if (got != wanted) fprintf(stderr, "expected status %d, got %d: %s\n", wanted, got, dsa_tvm_last_error());
  return got != wanted;
}

int main(void) {
  int64_t iq_shape[] = {1, H_IDX, D_IDX}, ik_shape[] = {S_KV, D_IDX}, w_shape[] = {1, H_IDX}, one[] = {1};
  int64_t q_shape[] = {1, H_Q, D_QK}, kv_shape[] = {S_KV, D_QK}, index_shape[] = {1, TOPK};
  int64_t out_shape[] = {1, H_Q, D_V}, lse_shape[] = {1, H_Q};
  int32_t start = 0, stop = S_KV, chosen[TOPK];
  float out[H_Q * D_V], lse[H_Q], again[H_Q * D_V], max_logits[H_Q];
  dsa_tvm_tensor iq = tensor(numbers(H_IDX * D_IDX), DSA_TVM_FLOAT, iq_shape, 3);
  dsa_tvm_tensor ik = tensor(numbers(S_KV * D_IDX), DSA_TVM_FLOAT, ik_shape, 2);
  dsa_tvm_tensor w = tensor(numbers(H_IDX), DSA_TVM_FLOAT, w_shape, 2);
  dsa_tvm_tensor ks = tensor(&start, DSA_TVM_INT, one, 1), ke = tensor(&stop, DSA_TVM_INT, one, 1);
  dsa_tvm_tensor q = tensor(numbers(H_Q * D_QK), DSA_TVM_FLOAT, q_shape, 3);
  dsa_tvm_tensor kv = tensor(numbers(S_KV * D_QK), DSA_TVM_FLOAT, kv_shape, 2);
  dsa_tvm_tensor indices = tensor(chosen, DSA_TVM_INT, index_shape, 2);
  dsa_tvm_tensor o = tensor(out, DSA_TVM_FLOAT, out_shape, 3), l = tensor(lse, DSA_TVM_FLOAT, lse_shape, 2);
  dsa_tvm_tensor o2 = tensor(again, DSA_TVM_FLOAT, out_shape, 3);
  dsa_tvm_tensor mx = tensor(max_logits, DSA_TVM_FLOAT, lse_shape, 2);
  dsa_tvm_options options = {.size = sizeof(dsa_tvm_options), .num_threads = 2};
  double total = 0, best = 0;
  int i, d, failed = 0;

  printf("version %s, target %s\n", dsa_tvm_version(), dsa_tvm_target());
  if (dsa_tvm_abi_version() != DSA_TVM_ABI_VERSION) return 1;
  failed |= expect(dsa_tvm_dsa_attention(&iq, &ik, &w, &ks, &ke, &q, &kv, NULL, NULL, TOPK, 0.05, D_V, &o, &l, &options),
                   DSA_TVM_OK);
  failed |= expect(dsa_tvm_indexer_topk(&iq, &ik, &w, &ks, &ke, NULL, TOPK, &indices, NULL), DSA_TVM_OK);
  failed |= expect(dsa_tvm_sparse_mla(&q, &kv, &indices, NULL, NULL, 0.05, D_V, &o2, &mx, &l, NULL), DSA_TVM_OK);
  if (memcmp(out, again, sizeof out)) return fprintf(stderr, "the whole is not its parts\n"), 1;

  /* Head 0, entry 0 in double precision. */
  for (i = 0; i < TOPK; i++) {
    double s = 0;
    const float *key = (const float *)kv.data + (size_t)chosen[i] * D_QK;
    for (d = 0; d < D_QK; d++) s += (double)((const float *)q.data)[d] * key[d];
    total += exp(0.05 * s);
    best += exp(0.05 * s) * key[0];
  }
  if (fabs(best / total - out[0]) > 1e-6 || fabs(log(total) - lse[0]) > 1e-5)
    return fprintf(stderr, "out %g, expected %g\n", out[0], best / total), 1;

  stop = 7;
  failed |= expect(dsa_tvm_topk(&iq, &ks, &ke, TOPK, &indices, NULL), DSA_TVM_INVALID_ARGUMENT);
  if (!strstr(dsa_tvm_last_error(), "topk: logits: expected rank 2")) return fprintf(stderr, "words\n"), 1;
  failed |= expect(dsa_tvm_topk(NULL, &ks, &ke, TOPK, &indices, NULL), DSA_TVM_INVALID_ARGUMENT);
  free(iq.data);
  free(ik.data);
  free(w.data);
  free(q.data);
  free(kv.data);
  puts(failed ? "failed" : "ok");
  return failed;
}
