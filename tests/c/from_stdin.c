/* Runs one operator on tensors from standard input and writes its outputs to standard output, for emulated machines.
 *
 * Usage: from_stdin OPERATOR THREADS. A tensor is its DLPack type code, bits, rank and shape as int64, then its data. The
 * target goes to standard error. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dsa_tvm/dsa_tvm.h"

enum { MOST_DIMS = 4, D_V = 512 };

static size_t size_of(const dsa_tvm_tensor *t) {
  size_t bytes = t->dtype.bits / 8;
  for (int i = 0; i < t->ndim; i++) bytes *= (size_t)t->shape[i];
  return bytes;
}

static dsa_tvm_tensor make(int64_t code, int64_t bits, int64_t ndim, const int64_t *shape) {
  dsa_tvm_tensor t;
  memset(&t, 0, sizeof t);
  t.device.device_type = 1;
  t.ndim = (int)ndim;
  t.dtype.code = (uint8_t)code;
  t.dtype.bits = (uint8_t)bits;
  t.dtype.lanes = 1;
  t.shape = malloc(MOST_DIMS * sizeof *shape);
  if (!t.shape) exit(3);
  memcpy(t.shape, shape, (size_t)ndim * sizeof *shape);
  t.data = malloc(size_of(&t) + 1);
  if (!t.data) exit(3);
  return t;
}

static void get(void *data, size_t bytes) {
  if (fread(data, 1, bytes, stdin) != bytes) exit(4);
}

static dsa_tvm_tensor take(void) {
  int64_t head[3], shape[MOST_DIMS];
  get(head, sizeof head);
  if (head[2] < 0 || head[2] > MOST_DIMS) exit(4);
  get(shape, (size_t)head[2] * sizeof *shape);
  dsa_tvm_tensor t = make(head[0], head[1], head[2], shape);
  get(t.data, size_of(&t));
  return t;
}

static void put(const dsa_tvm_tensor *t) {
  if (fwrite(t->data, 1, size_of(t), stdout) != size_of(t)) exit(5);
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  dsa_tvm_options options = {.size = sizeof options, .num_threads = atoi(argv[2])};
  dsa_tvm_status status;
  if (!strcmp(argv[1], "lightning_indexer")) {
    dsa_tvm_tensor q = take(), k = take(), weights = take(), ks = take(), ke = take();
    int64_t shape[] = {q.shape[0], k.shape[0]};
    dsa_tvm_tensor logits = make(DSA_TVM_FLOAT, 32, 2, shape);
    status = dsa_tvm_lightning_indexer(&q, &k, &weights, &ks, &ke, NULL, &logits, &options);
    put(&logits);
  } else {
    dsa_tvm_tensor q = take(), kv = take(), indices = take();
    int64_t shape[] = {q.shape[0], q.shape[1], D_V};
    dsa_tvm_tensor out = make(DSA_TVM_BFLOAT, 16, 3, shape), max_logits = make(DSA_TVM_FLOAT, 32, 2, shape);
    dsa_tvm_tensor lse = make(DSA_TVM_FLOAT, 32, 2, shape);
    int packed = !strcmp(argv[1], "sparse_mla_fp8");
    status = (packed ? dsa_tvm_sparse_mla_fp8 : dsa_tvm_sparse_mla)(&q, &kv, &indices, NULL, NULL, 0.1, D_V, &out,
                                                                    &max_logits, &lse, &options);
    put(&out);
    put(&max_logits);
    put(&lse);
  }
  fprintf(stderr, "%s", status ? dsa_tvm_last_error() : dsa_tvm_target());
  return (int)status;
}
