/* Kernels that write which row of the table they stand in, instead of computing. */
#include "common/internal.h"

static float *row_of(const struct tvm_any *tensor, int64_t row) {
  const dsa_tvm_tensor *t = tensor->value.p;
  int64_t stride = 1;
  for (int i = 1; i < t->ndim; i++) stride *= t->shape[i];
  return (float *)t->data + row * stride;
}

#define KERNEL(name) int __tvm_ffi_##name(void *self, const struct tvm_any *args, int32_t n, struct tvm_any *result)

/* The weights count the keys that each query is scored with. */
static int index_keys(const struct tvm_any *args, int row) {
  int64_t queries = args[8].value.i - args[7].value.i;
  for (int64_t i = 0; i < queries; i++) {
    float *logits = row_of(&args[6], args[11].value.i + i);
    for (int64_t n = args[9].value.i; n < args[10].value.i; n++) logits[n] = (float)row;
    *row_of(&args[2], args[7].value.i + i) += (float)(args[10].value.i - args[9].value.i);
  }
  return 0;
}

/* 10 times what stands in the logits of the first key, which is the indexer's row, plus its own. */
static int select_keys(const struct tvm_any *args, int row) {
  int64_t queries = args[5].value.i - args[4].value.i;
  for (int64_t i = 0; i < queries; i++) {
    int32_t *indices = (int32_t *)row_of(&args[3], args[7].value.i + i);
    int32_t first = *(int32_t *)row_of(&args[1], args[4].value.i + i);
    indices[0] = 10 * (int32_t)row_of(&args[0], args[6].value.i + i)[first] + row;
  }
  return 0;
}

/* The same once more, into lse. */
static int attend(const struct tvm_any *args, int row) {
  const int32_t *indices = (const int32_t *)row_of(&args[2], args[11].value.i);
  float *lse = row_of(&args[7], args[8].value.i);
  for (int64_t h = args[9].value.i; h < args[10].value.i; h++) lse[h] = (float)(10 * indices[0] + row);
  return 0;
}

#define ROW(number)                                                                       \
  KERNEL(indexer_##number) { return (void)self, (void)n, (void)result, index_keys(args, number); } \
  KERNEL(topk_##number) { return (void)self, (void)n, (void)result, select_keys(args, number); }   \
  KERNEL(mla_##number) { return (void)self, (void)n, (void)result, attend(args, number); }

ROW(0)
ROW(1)
ROW(2)
ROW(3)
