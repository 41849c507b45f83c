/* Writes new rows into a cache by copying bytes. */
#include <string.h>

#include "cpu/stages.h"

/* The least that a task copies. Less would not be worth waking a thread. */
enum { TASK_BYTES = 256 << 10 };

struct writing {
  const char *cache, *rows;
  const int32_t *positions;
  char *out;
  int64_t batch, capacity, s_new, row_bytes, cache_bytes;
  int64_t shares; /* tasks that share the rows of a sequence */
};

static void copy_task(void *arg, int64_t index) {
  struct writing *w = arg;
  int64_t start = index * TASK_BYTES, bytes = minimum(TASK_BYTES, w->cache_bytes - start);
  memcpy(w->out + start, w->cache + start, (size_t)bytes);
}

/* Each row of the cache belongs to one task, and a task writes new rows in order. So the last row of a position wins,
 * for any number of tasks. Neighbouring rows belong to different tasks, because new positions mostly follow each
 * other. */
static void write_task(void *arg, int64_t index) {
  struct writing *w = arg;
  int64_t b = index / w->shares, share = index % w->shares;
  const int32_t *positions = w->positions + b * w->s_new;
  const char *rows = w->rows + b * w->s_new * w->row_bytes;
  char *out = w->out + b * w->capacity * w->row_bytes;
  for (int64_t i = 0; i < w->s_new; i++) {
    int64_t p = positions[i];
    if (p < 0 || p >= w->capacity || (w->shares > 1 && p % w->shares != share)) continue;
    memcpy(out + p * w->row_bytes, rows + i * w->row_bytes, (size_t)w->row_bytes);
  }
}

static void run(const struct dsa_executor *executor, int64_t bytes, int64_t count, dsa_task task, struct writing *w) {
  dsa_parallel_for(executor, bytes > TASK_BYTES ? executor->threads : 1, count, task, w);
}

dsa_tvm_status dsa_write_rows(const struct dsa_call *call, const struct dsa_executor *executor) {
  struct writing w = {.cache = call->in[0].data,
                      .rows = call->in[1].data,
                      .positions = call->in[2].data,
                      .out = call->out[0].data,
                      .batch = call->dim[DIM_BATCH],
                      .capacity = call->dim[DIM_CAPACITY],
                      .s_new = call->dim[DIM_S_NEW],
                      .row_bytes = call->dim[DIM_D_ROW] * (call->in[0].dtype.bits / 8)};
  w.cache_bytes = w.batch * w.capacity * w.row_bytes;
  if (!w.cache_bytes) return DSA_TVM_OK;
  if (w.out != w.cache) run(executor, w.cache_bytes, divide_up(w.cache_bytes, TASK_BYTES), copy_task, &w);
  int64_t bytes = w.s_new * w.row_bytes;
  w.shares = minimum(executor->threads, divide_up(bytes, TASK_BYTES));
  if (bytes) run(executor, w.batch * bytes, w.batch * w.shares, write_task, &w);
  return DSA_TVM_OK;
}
