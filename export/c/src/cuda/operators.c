/* The operators on a GPU: what of a checked call each stage gets. */
#include "cuda/pool.h"
#include "cuda/stages.h"
#include "cuda/workspace.h"

const int dsa_has_cuda = 1;

/* What is held of the logits, and of the indices, of a group of queries: enough for all multiprocessors, and little
 * enough to be read from the cache. A single query may take more. */
enum { LOGIT_BYTES = 64 << 20, INDEX_BYTES = 64 << 20 };
static int64_t group_of(int64_t rows, int64_t row_bytes, int64_t most_bytes) {
  int64_t fits = row_bytes ? most_bytes / row_bytes : rows;
  return minimum(rows, fits ? fits : 1);
}

static void *row_of(const void *first, int64_t row, int64_t row_bytes) { return (char *)first + row * row_bytes; }

static const void *optional(const struct dsa_call *call, int i) { return call->present[i] ? call->in[i].data : NULL; }

static struct cuda_scoring scoring_of(const struct dsa_call *call, int k_scale) {
  return (struct cuda_scoring){.q = call->in[0].data,
                               .k = call->in[1].data,
                               .weights = call->in[2].data,
                               .ks = call->in[3].data,
                               .ke = call->in[4].data,
                               .k_scale = optional(call, k_scale),
                               .m1 = call->dim[DIM_S_Q],
                               .s_kv = call->dim[DIM_S_KV],
                               .h_idx = call->dim[DIM_H_IDX],
                               .scaled = call->present[k_scale]};
}

static dsa_tvm_status run_lightning_indexer(struct cuda_call *c) {
  struct cuda_scoring s = scoring_of(c->call, 5);
  s.logits = c->call->out[0].data;
  return dsa_cuda_score(c, &s);
}

static dsa_tvm_status run_topk(struct cuda_call *c) {
  const struct dsa_call *call = c->call;
  struct cuda_selection s = {.logits = call->in[0].data,
                             .ks = call->in[1].data,
                             .ke = call->in[2].data,
                             .indices = call->out[0].data,
                             .rows = call->dim[DIM_S_Q],
                             .s_kv = call->dim[DIM_S_KV],
                             .topk = call->dim[DIM_TOPK]};
  return dsa_cuda_select(c, &s);
}

/* Scoring and selection of queries [m0, m1), for a group of them at a time. The first row goes to `indices`. */
static dsa_tvm_status index_rows(struct cuda_call *c, struct cuda_scoring s, int64_t m0, int64_t m1, void *indices) {
  int64_t topk = c->call->dim[DIM_TOPK], group = group_of(m1 - m0, 4 * s.s_kv, LOGIT_BYTES);
  uint64_t before = c->used;
  dsa_tvm_status status = DSA_TVM_OK;
  s.only_visible = 1;
  s.logits = dsa_cuda_take(c, 4u * (uint64_t)(group * s.s_kv));
  for (int64_t m = m0; m < m1 && status == DSA_TVM_OK; m += group) {
    s.m0 = m;
    s.m1 = minimum(m + group, m1);
    struct cuda_selection t = {.logits = s.logits,
                               .ks = row_of(s.ks, m, 4),
                               .ke = row_of(s.ke, m, 4),
                               .indices = row_of(indices, m - m0, 4 * topk),
                               .rows = s.m1 - m,
                               .s_kv = s.s_kv,
                               .topk = topk};
    uint64_t held = c->used;
    status = dsa_cuda_score(c, &s);
    if (status == DSA_TVM_OK) status = dsa_cuda_select(c, &t);
    c->used = held;
  }
  c->used = before;
  return status;
}

static dsa_tvm_status run_indexer_topk(struct cuda_call *c) {
  return index_rows(c, scoring_of(c->call, 5), 0, c->call->dim[DIM_S_Q], c->call->out[0].data);
}

static dsa_tvm_status attend_rows(struct cuda_call *c, int packed) {
  const struct dsa_call *call = c->call;
  struct cuda_attention a = {.q = call->in[0].data,
                             .kv = call->in[1].data,
                             .indices = call->in[2].data,
                             .sink = optional(call, 3),
                             .length = optional(call, 4),
                             .out = call->out[0].data,
                             .max_logits = call->out[1].data,
                             .lse = call->out[2].data,
                             .rows = call->dim[DIM_S_Q],
                             .s_kv = call->dim[DIM_S_KV],
                             .h_q = call->dim[DIM_H_Q],
                             .topk = call->dim[DIM_TOPK],
                             .sm_scale = (float)call->attr[0].f,
                             .has_sink = call->present[3],
                             .has_length = call->present[4],
                             .packed = packed};
  return dsa_cuda_attend(c, &a);
}

static dsa_tvm_status run_sparse_mla(struct cuda_call *c) { return attend_rows(c, 0); }
static dsa_tvm_status run_sparse_mla_fp8(struct cuda_call *c) { return attend_rows(c, 1); }

static dsa_tvm_status run_write_rows(struct cuda_call *c) {
  const struct dsa_call *call = c->call;
  struct cuda_writing w = {.cache = call->in[0].data,
                           .rows = call->in[1].data,
                           .positions = call->in[2].data,
                           .out = call->out[0].data,
                           .batch = call->dim[DIM_BATCH],
                           .capacity = call->dim[DIM_CAPACITY],
                           .s_new = call->dim[DIM_S_NEW],
                           .row_bytes = call->dim[DIM_D_ROW] * (call->in[0].dtype.bits / 8)};
  return dsa_cuda_write_rows(c, &w);
}

static dsa_tvm_status run_dsa_attention(struct cuda_call *c) {
  const struct dsa_call *call = c->call;
  int64_t s_q = call->dim[DIM_S_Q], topk = call->dim[DIM_TOPK], h_q = call->dim[DIM_H_Q];
  int64_t width = call->in[5].dtype.bits / 8, group = group_of(s_q, 4 * topk, INDEX_BYTES);
  void *indices = dsa_cuda_take(c, 4u * (uint64_t)(group * topk));
  void *max_logits = dsa_cuda_take(c, 4u * (uint64_t)(group * h_q));
  dsa_tvm_status status = DSA_TVM_OK;
  for (int64_t m = 0; m < s_q && status == DSA_TVM_OK; m += group) {
    int64_t rows = minimum(group, s_q - m);
    struct cuda_attention a = {.q = row_of(call->in[5].data, m, h_q * call->dim[DIM_D_QK] * width),
                               .kv = call->in[6].data,
                               .indices = indices,
                               .sink = optional(call, 8),
                               .out = row_of(call->out[0].data, m, h_q * call->dim[DIM_D_V] * width),
                               .max_logits = max_logits,
                               .lse = row_of(call->out[1].data, m, h_q * 4),
                               .rows = rows,
                               .s_kv = call->dim[DIM_S_KV],
                               .h_q = h_q,
                               .topk = topk,
                               .sm_scale = (float)call->attr[1].f,
                               .has_sink = call->present[8]};
    uint64_t held = c->used;
    status = index_rows(c, scoring_of(call, 7), m, m + rows, indices);
    if (status == DSA_TVM_OK) status = dsa_cuda_attend(c, &a);
    c->used = held;
  }
  return status;
}

/* Each function goes twice through a call: once to find how much workspace it needs, and once to launch. */
static dsa_tvm_status (*const run[NUM_OPS])(struct cuda_call *) = {
    [OP_LIGHTNING_INDEXER] = run_lightning_indexer, [OP_TOPK] = run_topk, [OP_INDEXER_TOPK] = run_indexer_topk,
    [OP_SPARSE_MLA] = run_sparse_mla,               [OP_SPARSE_MLA_FP8] = run_sparse_mla_fp8,
    [OP_DSA_ATTENTION] = run_dsa_attention,         [OP_WRITE_ROWS] = run_write_rows,
};

static int is_aligned(const struct dsa_call *call) {
  for (int i = 0; i < call->op->num_inputs; i++) {
    int type = call->op->inputs[i].dtype;
    if ((type < 0 || type == DTYPE_UINT8) && (uintptr_t)call->in[i].data % 16) return 0;
  }
  return 1;
}

static dsa_tvm_status measure(struct cuda_call *c) {
  c->measuring = 1;
  c->used = 0;
  return run[c->call->op - dsa_ops](c);
}

dsa_tvm_status dsa_cuda_workspace(const struct dsa_call *call, int any_address, uint64_t *bytes) {
  struct cuda_call c = {.call = call, .aligned = is_aligned(call)};
  dsa_tvm_status status = dsa_cuda_find_device(&c);
  if (status == DSA_TVM_OK) status = measure(&c);
  if (status == DSA_TVM_OK && any_address) {
    c.aligned = !c.aligned;
    status = measure(&c);
  }
  *bytes = status == DSA_TVM_OK ? c.peak : 0;
  return status;
}

static dsa_tvm_status enqueue(struct cuda_call *c) {
  c->measuring = 0;
  c->used = 0;
  return run[c->call->op - dsa_ops](c);
}

dsa_tvm_status dsa_cuda_run(const struct dsa_call *call, const uint64_t *known, const dsa_tvm_options *options) {
  struct cuda_call c = {.call = call,
                        .stream = options->stream,
                        .workspace = options->workspace,
                        .peak = known ? *known : 0,
                        .aligned = is_aligned(call)};
  dsa_tvm_status status = dsa_cuda_begin(&c);
  if (status == DSA_TVM_OK && !known) status = measure(&c);
  if (status == DSA_TVM_OK) status = dsa_cuda_check_workspace(&c, options);
  if (status == DSA_TVM_OK) status = enqueue(&c);
  dsa_cuda_end(&c);
  return status;
}

dsa_tvm_status dsa_cuda_run_pooled(const struct dsa_call *call, void *stream) {
  struct cuda_call c = {.call = call, .stream = stream, .aligned = is_aligned(call)};
  uint64_t workspace = 0;
  dsa_tvm_status status = dsa_cuda_begin(&c);
  if (status == DSA_TVM_OK) status = measure(&c);
  if (status == DSA_TVM_OK && c.peak) status = dsa_cuda_pool_take(&c, c.peak, &workspace);
  c.workspace = (char *)(uintptr_t)workspace;
  if (status == DSA_TVM_OK) status = enqueue(&c);
  if (workspace) dsa_cuda_pool_give_back(&c, workspace);
  dsa_cuda_end(&c);
  return status;
}
