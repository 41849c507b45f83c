/* Which kernels each stage launches, with what grid, shared memory and workspace. */
#include "cuda_stages.h"

#include "cuda_launch.h"
#include "stages.h"

/* A block for each row leaves multiprocessors idle where the rows are few. The merge reads topk keys of every part, so
 * that parts pay until they are about as long as all that it reads. */
enum { LONG_ROW = 16384, MOST_PARTS = 64 };
static int64_t parts_of(const struct cuda_selection *s, const struct cuda_device *device) {
  int64_t parts = 1;
  if (s->s_kv < LONG_ROW || !s->rows) return parts;
  int64_t most = minimum(device->multiprocessors / s->rows, MOST_PARTS);
  while (parts < most && (parts + 1) * (parts + 1) * s->topk <= s->s_kv) parts++;
  return parts;
}

dsa_tvm_status dsa_cuda_select(struct cuda_call *c, const struct cuda_selection *s) {
  const struct cuda_shape *shape = dsa_shape_topk_rows(c);
  if (!shape) return DSA_TVM_UNSUPPORTED;
  const struct cuda_topk *cut = &shape->of.topk;
  int64_t parts = parts_of(s, c->device);
  void *values = NULL, *positions = NULL;
  if (parts > 1) {
    uint64_t bytes = 4u * (uint64_t)(s->rows * parts * s->topk);
    values = dsa_cuda_take(c, bytes);
    positions = dsa_cuda_take(c, bytes);
  }
  if (c->measuring) return DSA_TVM_OK;
  int64_t list = minimum(cut->list_factor * s->topk, cut->list_max);
  if (list < cut->list_min) list = cut->list_min;
  int capacity = (int)(list / 4 * 4);
  int64_t shared_bytes = cut->selector_bytes + 8 * (int64_t)capacity;
  if (parts == 1)
    return dsa_launch_topk_rows(c, s->rows, 1, shared_bytes, s->logits, s->ks, s->ke, NULL, NULL, s->indices, s->s_kv,
                                s->topk, capacity, s->rows, 1);
  dsa_tvm_status status = dsa_launch_topk_parts(c, s->rows, parts, shared_bytes, s->logits, s->ks, s->ke, NULL, values,
                                                positions, s->s_kv, s->topk, capacity, s->rows, parts);
  if (status != DSA_TVM_OK) return status;
  return dsa_launch_topk_merge(c, s->rows, 1, shared_bytes, values, NULL, NULL, positions, NULL, s->indices,
                               parts * s->topk, s->topk, capacity, s->rows, 1);
}
