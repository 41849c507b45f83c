/* The operators on a CPU. Each passes the parts of a checked call to its stages, and allocates what lies between. */
#include <stdlib.h>

#include "cpu/stages.h"

/* For an input that is absent or empty, a kernel gets this address. It is valid, and never read. */
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

static struct scoring scoring_of(const struct dsa_call *call, int k_scale, const struct kernel_set *kernels,
                                 struct dsa_outcome *outcome) {
  struct scoring s = {.outcome = outcome,
                      .kernel = kernels->indexer->entry[call->type[0]][call->type[1]],
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
  dsa_score(&s, kernels->indexer, executor);
  return finish(call, &outcome);
}

static dsa_tvm_status run_topk(const struct dsa_call *call, const struct kernel_set *kernels,
                               const struct dsa_executor *executor) {
  struct dsa_outcome outcome = {0};
  struct selection s = {.outcome = &outcome,
                        .kernel = kernels->topk->entry,
                        .logits = view(&call->in[0]),
                        .ks = view(&call->in[1]),
                        .ke = view(&call->in[2]),
                        .indices = view(&call->out[0])};
  dsa_select(&s, call->dim[DIM_S_Q], executor);
  return finish(call, &outcome);
}

/* Scoring and selection for one group of queries at a time, so that only the logits of one group are held. */
struct indexing {
  struct scoring scoring;
  struct selection selection;
  int64_t logits_shape[2];
  int64_t group;
};

static dsa_tvm_status no_memory(const struct dsa_call *call, const char *what) {
  return dsa_fail(DSA_TVM_OUT_OF_MEMORY, "%s: no memory for the %s of a group of queries", call->op->name, what);
}

/* Queries are scored and selected in groups whose logits are held. A group has enough queries for every thread, but its
 * logits take no more than 256 MiB, unless one tile of the indexer's kernel takes more. */
static int64_t group_size(const struct dsa_call *call, const struct kernel_set *kernels, int threads) {
  int64_t least = kernels->indexer->rows, held = (64 << 20) / (call->dim[DIM_S_KV] + 1) / least * least;
  int64_t group = minimum(least * threads, held > least ? held : least);
  return minimum(call->dim[DIM_S_Q], group);
}

/* After a success, the caller calls indexing_end. */
static dsa_tvm_status indexing_start(struct indexing *x, const struct dsa_call *call, int k_scale,
                                     const struct kernel_set *kernels, const struct dsa_executor *executor,
                                     struct dsa_outcome *outcome) {
  x->group = group_size(call, kernels, executor->threads);
  x->scoring = scoring_of(call, k_scale, kernels, outcome);
  x->logits_shape[0] = x->group;
  x->logits_shape[1] = call->dim[DIM_S_KV];
  /* The part of a row that a query does not see is never touched, and so takes no memory. */
  void *logits = malloc((size_t)(x->group * call->dim[DIM_S_KV] + 1) * sizeof(float));
  x->scoring.visible = malloc((size_t)(x->group + 1) * sizeof *x->scoring.visible);
  if (!logits || !x->scoring.visible) {
    free(logits);
    free(x->scoring.visible);
    return no_memory(call, "logits");
  }
  x->scoring.logits = workspace(logits, DSA_TVM_FLOAT, x->logits_shape, 2);
  x->selection = (struct selection){.outcome = outcome,
                                    .kernel = kernels->topk->entry,
                                    .logits = x->scoring.logits,
                                    .ks = x->scoring.ks,
                                    .ke = x->scoring.ke};
  return DSA_TVM_OK;
}

static void indexing_end(struct indexing *x) {
  free(x->scoring.logits.data);
  free(x->scoring.visible);
}

static void index_group(struct indexing *x, int64_t m0, int64_t m1, int64_t out0, const struct kernel_set *kernels,
                        const struct dsa_executor *executor) {
  x->scoring.m0 = x->selection.m0 = m0;
  x->scoring.m1 = m1;
  x->selection.out0 = out0;
  dsa_score(&x->scoring, kernels->indexer, executor);
  if (!x->scoring.outcome->failed) dsa_select(&x->selection, m1 - m0, executor);
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
  indexing_end(&x);
  return finish(call, &outcome);
}

static dsa_tvm_status attend_rows(const struct dsa_call *call, const struct kernel_set *kernels, dsa_kernel kernel,
                                  const struct dsa_executor *executor) {
  struct dsa_outcome outcome = {0};
  struct attention a = {.outcome = &outcome,
                        .kernel = kernel,
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
  dsa_attend(&a, call->dim[DIM_S_Q], kernels->mla, executor);
  return finish(call, &outcome);
}

static dsa_tvm_status run_write_rows(const struct dsa_call *call, const struct kernel_set *kernels,
                                     const struct dsa_executor *executor) {
  (void)kernels; /* it needs none */
  return dsa_write_rows(call, executor);
}

static dsa_tvm_status run_sparse_mla(const struct dsa_call *call, const struct kernel_set *kernels,
                                     const struct dsa_executor *executor) {
  return attend_rows(call, kernels, kernels->mla->entry[call->type[0]][call->type[0]], executor);
}

static dsa_tvm_status run_sparse_mla_fp8(const struct dsa_call *call, const struct kernel_set *kernels,
                                         const struct dsa_executor *executor) {
  return attend_rows(call, kernels, kernels->mla->entry[call->type[0]][DTYPE_FLOAT8_E4M3FN], executor);
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
                          .kernel = kernels->mla->entry[call->type[0]][call->type[0]],
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
      if (!outcome.failed) dsa_attend(&a, stop - m, kernels->mla, executor);
    }
    status = finish(call, &outcome);
  } else {
    status = no_memory(call, "indices");
  }
  free(max_logits);
  free(indices);
  indexing_end(&x);
  return status;
}

/* An indexer's kernel is chosen by these: the most keys that a query sees, and the most consecutive queries whose keys
 * overlap. They ignore unused rows of a cache and the rows of other sequences. So a decode step of a batch counts as
 * single queries, and each sequence gets the same bits as alone. */
struct demand {
  int64_t queries, keys;
};
static struct demand demand_of(const struct dsa_call *call) {
  static const int8_t ranges[NUM_OPS] = {
      [OP_LIGHTNING_INDEXER] = 3, [OP_TOPK] = 1, [OP_INDEXER_TOPK] = 3, [OP_DSA_ATTENTION] = 3};
  int i = ranges[call->op - dsa_ops];
  struct demand most = {0, 0};
  if (!i) return most;
  const int32_t *ks = call->in[i].data, *ke = call->in[i + 1].data;
  int64_t queries = 0, n0 = 0, n1 = 0;
  for (int64_t m = 0; m < call->dim[DIM_S_Q]; m++) {
    int64_t start = ks[m] > 0 ? ks[m] : 0, stop = minimum(ke[m], call->dim[DIM_S_KV]);
    if (start >= stop) continue;
    int meets = queries && start < n1 && n0 < stop;
    n0 = meets && n0 < start ? n0 : start;
    n1 = meets && n1 > stop ? n1 : stop;
    queries = meets ? queries + 1 : 1;
    if (queries > most.queries) most.queries = queries;
    if (stop - start > most.keys) most.keys = stop - start;
  }
  return most;
}

/* Picks the rows of the tables for a call. It looks at the whole call, not at groups of queries: their size depends on
 * the number of threads, and results must not. */
static struct kernel_set pick(const struct kernel_set *kernels, const struct dsa_call *call) {
  int64_t s_q = call->dim[DIM_S_Q], s_kv = call->dim[DIM_S_KV];
  struct demand most = demand_of(call);
  /* Element types of q, of the indexer's keys, and of the attention's rows, where e4m3 stands for packed rows. If an
   * operator lacks one of them, it does not run that kernel, and any type will do. */
  int t = call->type[0] < 0 ? 0 : call->type[0], k = call->type[1] < 0 ? 0 : call->type[1];
  int r = call->op == &dsa_ops[OP_SPARSE_MLA_FP8] ? DTYPE_FLOAT8_E4M3FN : t;
  struct kernel_set rows = *kernels;
#define SKIP(row, queries, keys, has_kernel) \
  while (!(row)->last && ((queries) > (row)->s_q || (keys) > (row)->s_kv || !(has_kernel))) (row)++
  SKIP(rows.indexer, most.queries, most.keys, rows.indexer->entry[t][k]);
  SKIP(rows.topk, s_q, most.keys, 1);
  SKIP(rows.mla, s_q, s_kv, rows.mla->entry[t][r]);
#undef SKIP
  return rows;
}

dsa_tvm_status dsa_run(const struct dsa_call *call, const struct dsa_executor *executor) {
  static dsa_tvm_status (*const run[NUM_OPS])(const struct dsa_call *, const struct kernel_set *,
                                              const struct dsa_executor *) = {
      [OP_LIGHTNING_INDEXER] = run_lightning_indexer, [OP_TOPK] = run_topk, [OP_INDEXER_TOPK] = run_indexer_topk,
      [OP_SPARSE_MLA] = run_sparse_mla,               [OP_SPARSE_MLA_FP8] = run_sparse_mla_fp8,
      [OP_DSA_ATTENTION] = run_dsa_attention,         [OP_WRITE_ROWS] = run_write_rows,
  };
  const struct kernel_set *kernels = dsa_kernels();
  if (!kernels) return DSA_TVM_UNSUPPORTED;
  struct kernel_set rows = pick(kernels, call);
  return run[call->op - dsa_ops](call, &rows, executor);
}
