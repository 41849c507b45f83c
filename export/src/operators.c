/* How each operator is cut into tasks for the compiled kernels. Every value is computed by one kernel call in one order,
 * so the results do not depend on the number of threads or on how the tasks were cut. */
#include <stdlib.h>

#include "internal.h"

enum { TASKS_PER_THREAD = 4 }; /* enough for dynamic scheduling to even out tasks of different lengths */

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

/* What a kernel takes for an input that is absent or empty: a valid address that is never read. */
static float nothing[16];

static dsa_tvm_tensor view(const dsa_tvm_tensor *x) {
  dsa_tvm_tensor v = *x;
  if (!v.data) v.data = nothing;
  for (int i = 0; i < NUM_DTYPES; i++)
    if (dsa_dtypes[i].code == v.dtype.code && dsa_dtypes[i].bits == v.dtype.bits)
      v.dtype.code = dsa_dtypes[i].storage_code;
  return v;
}

static dsa_tvm_tensor workspace(void *data, uint8_t code, int64_t *shape, int ndim) {
  dsa_tvm_tensor t = {0};
  t.data = data;
  t.device.device_type = 1;
  t.ndim = ndim;
  t.dtype.code = code;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

static int64_t one_element[1] = {1};

static dsa_tvm_tensor optional_view(const struct dsa_call *call, int i) {
  return call->present[i] ? view(&call->in[i]) : workspace(nothing, DSA_TVM_FLOAT, one_element, 1);
}

static dsa_tvm_status finish(const struct dsa_call *call, const struct dsa_outcome *outcome) {
  if (!outcome->failed) return DSA_TVM_OK;
  return dsa_fail(outcome->status, "%s: %s", call->op->name, outcome->message);
}

/* Scoring: queries [m0, m1) against all keys, written to the rows of `logits` from row 0 on. */
struct scoring {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor q, k, weights, ks, ke, k_scale, logits;
  int64_t m0, m1, rows, keys, key_tasks, s_kv;
  int scaled;
  int only_visible; /* nobody reads a logit outside [ks, ke) */
};

static int any_visible(const struct scoring *s, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const int32_t *ks = s->ks.data, *ke = s->ke.data;
  for (int64_t m = m0; m < m1; m++)
    if (ks[m] < ke[m] && ks[m] < n1 && n0 < ke[m]) return 1;
  return 0;
}

static void score_task(void *arg, int64_t index) {
  struct scoring *s = arg;
  int64_t m0 = s->m0 + index / s->key_tasks * s->rows, m1 = minimum(m0 + s->rows, s->m1);
  int64_t n0 = index % s->key_tasks * s->keys, n1 = minimum(n0 + s->keys, s->s_kv);
  if (s->only_visible && !any_visible(s, m0, m1, n0, n1)) return;
  const struct tvm_any args[] = {dsa_arg_tensor(&s->q),  dsa_arg_tensor(&s->k),       dsa_arg_tensor(&s->weights),
                                 dsa_arg_tensor(&s->ks), dsa_arg_tensor(&s->ke),      dsa_arg_tensor(&s->k_scale),
                                 dsa_arg_tensor(&s->logits), dsa_arg_int(m0),         dsa_arg_int(m1),
                                 dsa_arg_int(n0),        dsa_arg_int(n1),             dsa_arg_int(m0 - s->m0),
                                 dsa_arg_int(s->scaled)};
  dsa_call_kernel(s->outcome, s->kernel, args, sizeof args / sizeof args[0]);
}

static void score(struct scoring *s, const struct kernel_set *kernels, const struct dsa_executor *executor) {
  int64_t queries = s->m1 - s->m0;
  if (!queries || !s->s_kv) return;
  s->rows = minimum(kernels->indexer_rows, queries);
  int64_t row_tasks = divide_up(queries, s->rows), wanted = (int64_t)TASKS_PER_THREAD * executor->threads;
  /* Few queries: shorter runs of keys, so that every thread has work, but long enough to pay for packing q. */
  s->keys = kernels->indexer_task_keys;
  if (row_tasks * divide_up(s->s_kv, s->keys) < wanted)
    s->keys = divide_up(divide_up(s->s_kv * row_tasks, wanted), kernels->indexer_block_keys) *
              kernels->indexer_block_keys;
  if (s->keys < 256) s->keys = divide_up(256, kernels->indexer_block_keys) * kernels->indexer_block_keys;
  s->key_tasks = divide_up(s->s_kv, s->keys);
  executor->parallel_for(executor->state, row_tasks * s->key_tasks, score_task, s);
}

static struct scoring scoring_of(const struct dsa_call *call, int k_scale, const struct kernel_set *kernels,
                                 struct dsa_outcome *outcome) {
  struct scoring s = {.outcome = outcome,
                      .kernel = kernels->lightning_indexer[call->type[0]][call->type[1]],
                      .q = view(&call->in[0]),
                      .k = view(&call->in[1]),
                      .weights = view(&call->in[2]),
                      .ks = view(&call->in[3]),
                      .ke = view(&call->in[4]),
                      .k_scale = optional_view(call, k_scale),
                      .s_kv = call->dim[DIM_S_KV],
                      .scaled = call->present[k_scale]};
  return s;
}

static dsa_tvm_status run_lightning_indexer(const struct dsa_call *call, const struct kernel_set *kernels,
                                            const struct dsa_executor *executor) {
  struct dsa_outcome outcome = {0};
  struct scoring s = scoring_of(call, 5, kernels, &outcome);
  s.logits = view(&call->out[0]);
  s.m1 = call->dim[DIM_S_Q];
  score(&s, kernels, executor);
  return finish(call, &outcome);
}

/* Selection: queries [m0, m1), whose logits stand from row 0 on, into the rows of `indices` from out0 on. */
struct selection {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor logits, ks, ke, indices;
  int64_t m0, out0;
};

static void select_task(void *arg, int64_t index) {
  struct selection *s = arg;
  const struct tvm_any args[] = {dsa_arg_tensor(&s->logits), dsa_arg_tensor(&s->ks),    dsa_arg_tensor(&s->ke),
                                 dsa_arg_tensor(&s->indices), dsa_arg_int(s->m0 + index), dsa_arg_int(s->m0 + index + 1),
                                 dsa_arg_int(index),         dsa_arg_int(s->out0 + index)};
  dsa_call_kernel(s->outcome, s->kernel, args, sizeof args / sizeof args[0]);
}

static dsa_tvm_status run_topk(const struct dsa_call *call, const struct kernel_set *kernels,
                               const struct dsa_executor *executor) {
  struct dsa_outcome outcome = {0};
  struct selection s = {.outcome = &outcome,
                        .kernel = kernels->topk,
                        .logits = view(&call->in[0]),
                        .ks = view(&call->in[1]),
                        .ke = view(&call->in[2]),
                        .indices = view(&call->out[0])};
  executor->parallel_for(executor->state, call->dim[DIM_S_Q], select_task, &s);
  return finish(call, &outcome);
}

/* Both, for one group of queries: the logits of a group are all that is ever held. */
struct indexing {
  struct scoring scoring;
  struct selection selection;
  int64_t logits_shape[2];
  int64_t group;
};

static int64_t group_size(const struct dsa_call *call, const struct kernel_set *kernels,
                          const struct dsa_executor *executor) {
  return minimum(call->dim[DIM_S_Q], kernels->indexer_rows * executor->threads);
}

static dsa_tvm_status no_memory(const struct dsa_call *call, const char *what) {
  return dsa_fail(DSA_TVM_OUT_OF_MEMORY, "%s: no memory for the %s of a group of queries", call->op->name, what);
}

/* The caller frees scoring.logits.data. */
static dsa_tvm_status indexing_start(struct indexing *x, const struct dsa_call *call, int k_scale,
                                     const struct kernel_set *kernels, const struct dsa_executor *executor,
                                     struct dsa_outcome *outcome) {
  x->group = group_size(call, kernels, executor);
  x->scoring = scoring_of(call, k_scale, kernels, outcome);
  x->scoring.only_visible = 1;
  x->logits_shape[0] = x->group;
  x->logits_shape[1] = call->dim[DIM_S_KV];
  void *logits = malloc((size_t)(x->group * call->dim[DIM_S_KV] + 1) * sizeof(float));
  if (!logits) return no_memory(call, "logits");
  x->scoring.logits = workspace(logits, DSA_TVM_FLOAT, x->logits_shape, 2);
  x->selection = (struct selection){.outcome = outcome,
                                    .kernel = kernels->topk,
                                    .logits = x->scoring.logits,
                                    .ks = x->scoring.ks,
                                    .ke = x->scoring.ke};
  return DSA_TVM_OK;
}

static void index_group(struct indexing *x, int64_t m0, int64_t m1, int64_t out0, const struct kernel_set *kernels,
                        const struct dsa_executor *executor) {
  x->scoring.m0 = x->selection.m0 = m0;
  x->scoring.m1 = m1;
  x->selection.out0 = out0;
  score(&x->scoring, kernels, executor);
  if (!x->scoring.outcome->failed) executor->parallel_for(executor->state, m1 - m0, select_task, &x->selection);
}

static dsa_tvm_status run_indexer_topk(const struct dsa_call *call, const struct kernel_set *kernels,
                                       const struct dsa_executor *executor) {
  struct dsa_outcome outcome = {0};
  struct indexing x;
  dsa_tvm_status status = indexing_start(&x, call, 5, kernels, executor, &outcome);
  if (status != DSA_TVM_OK) return status;
  x.selection.indices = view(&call->out[0]);
  for (int64_t m = 0; m < call->dim[DIM_S_Q] && !outcome.failed; m += x.group)
    index_group(&x, m, minimum(m + x.group, call->dim[DIM_S_Q]), m, kernels, executor);
  free(x.scoring.logits.data);
  return finish(call, &outcome);
}

/* Attention: queries [m0, ...), whose indices and maxima stand in the rows from row0 on. */
struct attention {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor q, kv, indices, sink, length, out, max_logits, lse;
  int64_t m0, row0, heads, head_tasks, h_q;
  double sm_scale;
  int has_sink, has_length;
};

static void attend_task(void *arg, int64_t index) {
  struct attention *a = arg;
  int64_t m = index / a->head_tasks, h0 = index % a->head_tasks * a->heads;
  const struct tvm_any args[] = {dsa_arg_tensor(&a->q),
                                 dsa_arg_tensor(&a->kv),
                                 dsa_arg_tensor(&a->indices),
                                 dsa_arg_tensor(&a->sink),
                                 dsa_arg_tensor(&a->length),
                                 dsa_arg_tensor(&a->out),
                                 dsa_arg_tensor(&a->max_logits),
                                 dsa_arg_tensor(&a->lse),
                                 dsa_arg_int(a->m0 + m),
                                 dsa_arg_int(h0),
                                 dsa_arg_int(minimum(h0 + a->heads, a->h_q)),
                                 dsa_arg_int(a->row0 + m),
                                 dsa_arg_float(a->sm_scale),
                                 dsa_arg_int(a->has_sink),
                                 dsa_arg_int(a->has_length)};
  dsa_call_kernel(a->outcome, a->kernel, args, sizeof args / sizeof args[0]);
}

static void attend(struct attention *a, int64_t queries, const struct kernel_set *kernels,
                   const struct dsa_executor *executor) {
  int64_t tile = kernels->mla_heads;
  a->heads = kernels->mla_task_heads;
  /* Few queries: fewer heads to a task, down to one register tile, until every thread has work. */
  while (a->heads > tile && queries * divide_up(a->h_q, a->heads) < executor->threads)
    a->heads = divide_up(a->heads / 2, tile) * tile;
  a->head_tasks = divide_up(a->h_q, a->heads);
  executor->parallel_for(executor->state, queries * a->head_tasks, attend_task, a);
}

static dsa_tvm_status run_sparse_mla(const struct dsa_call *call, const struct kernel_set *kernels,
                                     const struct dsa_executor *executor) {
  struct dsa_outcome outcome = {0};
  struct attention a = {.outcome = &outcome,
                        .kernel = kernels->sparse_mla[call->type[0]],
                        .q = view(&call->in[0]),
                        .kv = view(&call->in[1]),
                        .indices = view(&call->in[2]),
                        .sink = optional_view(call, 3),
                        .length = optional_view(call, 4),
                        .out = view(&call->out[0]),
                        .max_logits = view(&call->out[1]),
                        .lse = view(&call->out[2]),
                        .h_q = call->dim[DIM_H_Q],
                        .sm_scale = call->attr[0].f,
                        .has_sink = call->present[3],
                        .has_length = call->present[4]};
  if (!a.has_length) a.length.dtype.code = DSA_TVM_INT;
  attend(&a, call->dim[DIM_S_Q], kernels, executor);
  return finish(call, &outcome);
}

static dsa_tvm_status run_dsa_attention(const struct dsa_call *call, const struct kernel_set *kernels,
                                        const struct dsa_executor *executor) {
  struct dsa_outcome outcome = {0};
  struct indexing x;
  dsa_tvm_status status = indexing_start(&x, call, 7, kernels, executor, &outcome);
  if (status != DSA_TVM_OK) return status;
  int64_t s_q = call->dim[DIM_S_Q], topk = call->dim[DIM_TOPK], h_q = call->dim[DIM_H_Q];
  int64_t indices_shape[2] = {x.group, topk}, max_shape[2] = {x.group, h_q};
  void *indices = malloc((size_t)(x.group * topk + 1) * sizeof(int32_t));
  void *max_logits = malloc((size_t)(x.group * h_q + 1) * sizeof(float));
  if (indices && max_logits) {
    x.selection.indices = workspace(indices, DSA_TVM_INT, indices_shape, 2);
    struct attention a = {.outcome = &outcome,
                          .kernel = kernels->sparse_mla[call->type[0]],
                          .q = view(&call->in[5]),
                          .kv = view(&call->in[6]),
                          .indices = x.selection.indices,
                          .sink = optional_view(call, 8),
                          .length = workspace(nothing, DSA_TVM_INT, one_element, 1),
                          .out = view(&call->out[0]),
                          .max_logits = workspace(max_logits, DSA_TVM_FLOAT, max_shape, 2),
                          .lse = view(&call->out[1]),
                          .h_q = h_q,
                          .sm_scale = call->attr[1].f,
                          .has_sink = call->present[8]};
    for (int64_t m = 0; m < s_q && !outcome.failed; m += x.group) {
      int64_t stop = minimum(m + x.group, s_q);
      index_group(&x, m, stop, 0, kernels, executor);
      a.m0 = m;
      if (!outcome.failed) attend(&a, stop - m, kernels, executor);
    }
    status = finish(call, &outcome);
  } else {
    status = no_memory(call, "indices");
  }
  free(max_logits);
  free(indices);
  free(x.scoring.logits.data);
  return status;
}

dsa_tvm_status dsa_run(const struct dsa_call *call, const struct dsa_executor *executor) {
  static dsa_tvm_status (*const run[NUM_OPS])(const struct dsa_call *, const struct kernel_set *,
                                              const struct dsa_executor *) = {
      [OP_LIGHTNING_INDEXER] = run_lightning_indexer, [OP_TOPK] = run_topk, [OP_INDEXER_TOPK] = run_indexer_topk,
      [OP_SPARSE_MLA] = run_sparse_mla,               [OP_DSA_ATTENTION] = run_dsa_attention,
  };
  const struct kernel_set *kernels = dsa_kernels();
  return kernels ? run[call->op - dsa_ops](call, kernels, executor) : DSA_TVM_UNSUPPORTED;
}
