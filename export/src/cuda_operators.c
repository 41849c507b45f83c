/* The operators on a GPU: what of a checked call each stage gets. */
#include <stdio.h>

#include "cuda_stages.h"

const int dsa_has_cuda = 1;

const char *dsa_tvm_cuda_archs(void) {
  static _Thread_local char text[256];
  size_t used = 0;
  for (int i = 0; i < dsa_num_cuda_sets; i++)
    for (const struct cuda_arch *arch = dsa_cuda_sets[i].archs; arch->number && used < sizeof text; arch++)
      used += (size_t)snprintf(text + used, sizeof text - used, "sm_%d%s,", arch->number, arch->exact ? "a" : "");
  for (int i = 0; i < dsa_num_cuda_sets && used < sizeof text; i++)
    if (dsa_cuda_sets[i].ptx) snprintf(text + used, sizeof text - used, "compute_%d", dsa_cuda_sets[i].ptx);
  return text;
}

void *dsa_cuda_take(struct cuda_call *call, uint64_t bytes) {
  char *taken = call->measuring ? NULL : call->workspace + call->used;
  call->used += (bytes + CUDA_ALIGNMENT - 1) / CUDA_ALIGNMENT * CUDA_ALIGNMENT;
  if (call->used > call->peak) call->peak = call->used;
  return taken;
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

/* Each runs twice: first it tells what it takes of the workspace, and then it launches. */
static dsa_tvm_status (*const run[NUM_OPS])(struct cuda_call *) = {
    [OP_TOPK] = run_topk,
};

int dsa_cuda_serves(const struct op_spec *op) { return run[op - dsa_ops] != NULL; }

static dsa_tvm_status measure(struct cuda_call *c) {
  const struct op_spec *op = c->call->op;
  if (!dsa_cuda_serves(op)) return dsa_fail(DSA_TVM_UNSUPPORTED, "%s: there are no CUDA kernels for it", op->name);
  dsa_tvm_status status = dsa_cuda_begin(c);
  if (status != DSA_TVM_OK) return status;
  c->measuring = 1;
  return run[op - dsa_ops](c);
}

dsa_tvm_status dsa_cuda_workspace(const struct dsa_call *call, uint64_t *bytes) {
  struct cuda_call c = {.call = call};
  dsa_tvm_status status = measure(&c);
  dsa_cuda_end(&c);
  *bytes = c.peak;
  return status;
}

dsa_tvm_status dsa_cuda_run(const struct dsa_call *call, const dsa_tvm_options *options) {
  struct cuda_call c = {.call = call, .stream = options->stream, .workspace = options->workspace};
  dsa_tvm_status status = measure(&c);
  if (status == DSA_TVM_OK) status = dsa_check_workspace(call, options, c.peak);
  if (status == DSA_TVM_OK) {
    c.measuring = 0;
    c.used = 0;
    status = run[call->op - dsa_ops](&c);
  }
  dsa_cuda_end(&c);
  return status;
}
