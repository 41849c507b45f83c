/* The public functions. Each lists its arguments, and execute() does the rest. */
#include <stdlib.h>
#include <string.h>

#include "common/internal.h"

int32_t dsa_tvm_abi_version(void) { return DSA_TVM_ABI_VERSION; }

const char *dsa_tvm_version(void) { return PACKAGE_VERSION; }

const char *dsa_tvm_target(void) {
  const struct kernel_set *kernels = dsa_kernels();
  return kernels ? kernels->target : NULL;
}

/* The size that the options had in the first version. Programs that were compiled then still pass it. */
enum { FIRST_OPTIONS = 8 };

static dsa_tvm_status read_options(const char *op, const dsa_tvm_options *options, dsa_tvm_options *how) {
  memset(how, 0, sizeof *how);
  if (options && options->size < FIRST_OPTIONS)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: options: expected size of at least %d, got %u", op, FIRST_OPTIONS,
                    (unsigned)options->size);
  if (options) memcpy(how, options, options->size < sizeof *how ? options->size : sizeof *how);
  if (how->num_threads >= 0) return DSA_TVM_OK;
  return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: num_threads: expected 0 or more, got %d", op, (int)how->num_threads);
}

/* Computes a call whose inputs have been checked. `workspace`: what dsa_cuda_workspace told for it, or NULL. */
static dsa_tvm_status compute(struct dsa_call *call, const uint64_t *workspace, dsa_tvm_tensor *const *outputs,
                              const dsa_tvm_options *how) {
  dsa_tvm_status status = dsa_check_outputs(call, outputs);
  if (status != DSA_TVM_OK) return status;
  if (call->device_type == CUDA_DEVICE) return dsa_cuda_run(call, workspace, how);
  struct dsa_executor executor = dsa_pool_executor(how->num_threads);
  return dsa_run(call, &executor);
}

static dsa_tvm_status execute(int op, const dsa_tvm_tensor *const *inputs, const dsa_tvm_attr *attrs,
                              dsa_tvm_tensor *const *outputs, const dsa_tvm_options *options) {
  dsa_tvm_options how;
  dsa_tvm_status status = read_options(dsa_ops[op].name, options, &how);
  if (status != DSA_TVM_OK) return status;
  struct dsa_call call = {.op = &dsa_ops[op], .takes_cuda = dsa_has_cuda};
  status = dsa_check_inputs(&call, inputs, attrs);
  return status == DSA_TVM_OK ? compute(&call, NULL, outputs, &how) : status;
}

/* Finds the operator with this name and checks the counts; -1, with an error set, if they are wrong. num_outputs is
 * NULL for functions that take no outputs. */
static int find(const char *op, const void *inputs, int32_t num_inputs, const void *attrs, int32_t num_attrs,
                const void *outputs, const int32_t *num_outputs) {
  for (int i = 0; op && i < NUM_OPS; i++) {
    const struct op_spec *spec = &dsa_ops[i];
    if (strcmp(op, spec->name)) continue;
    int outs = num_outputs ? (int)*num_outputs : spec->num_outputs;
    if (num_inputs != spec->num_inputs || num_attrs != spec->num_attrs || outs != spec->num_outputs)
      dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: expected %d inputs, %d attributes and %d outputs, got %d, %d and %d", op,
               spec->num_inputs, spec->num_attrs, spec->num_outputs, (int)num_inputs, (int)num_attrs, outs);
    else if (!inputs || !outputs || (num_attrs && !attrs))
      dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: expected arrays of arguments, got a null pointer", op);
    else
      return i;
    return -1;
  }
  dsa_fail(DSA_TVM_INVALID_ARGUMENT, "op: expected the name of an operator, got %.64s", op ? op : "a null pointer");
  return -1;
}

dsa_tvm_status dsa_tvm_call(const char *op, const dsa_tvm_tensor *const *inputs, int32_t num_inputs,
                            const dsa_tvm_attr *attrs, int32_t num_attrs, dsa_tvm_tensor *const *outputs,
                            int32_t num_outputs, const dsa_tvm_options *options) {
  int i = find(op, inputs, num_inputs, attrs, num_attrs, outputs, &num_outputs);
  return i < 0 ? DSA_TVM_INVALID_ARGUMENT : execute(i, inputs, attrs, outputs, options);
}

dsa_tvm_status dsa_tvm_output_shapes(const char *op, const dsa_tvm_tensor *const *inputs, int32_t num_inputs,
                                     const dsa_tvm_attr *attrs, int32_t num_attrs, int64_t (*shapes)[3],
                                     int32_t num_outputs) {
  int i = find(op, inputs, num_inputs, attrs, num_attrs, shapes, &num_outputs);
  if (i < 0) return DSA_TVM_INVALID_ARGUMENT;
  struct dsa_call call = {.op = &dsa_ops[i], .takes_cuda = dsa_has_cuda};
  dsa_tvm_status status = dsa_check_inputs(&call, inputs, attrs);
  for (int j = 0; status == DSA_TVM_OK && j < num_outputs; j++) dsa_output_shape(&call, j, shapes[j]);
  return status;
}

dsa_tvm_status dsa_tvm_workspace_size(const char *op, const dsa_tvm_tensor *const *inputs, int32_t num_inputs,
                                      const dsa_tvm_attr *attrs, int32_t num_attrs, uint64_t *bytes) {
  int i = find(op, inputs, num_inputs, attrs, num_attrs, bytes, NULL);
  if (i < 0) return DSA_TVM_INVALID_ARGUMENT;
  struct dsa_call call = {.op = &dsa_ops[i], .takes_cuda = dsa_has_cuda};
  dsa_tvm_status status = dsa_check_inputs(&call, inputs, attrs);
  if (status != DSA_TVM_OK) return status;
  *bytes = 0;
  return call.device_type == CUDA_DEVICE ? dsa_cuda_workspace(&call, 1, bytes) : DSA_TVM_OK;
}

dsa_tvm_plan *dsa_tvm_plan_create(void) {
  dsa_tvm_plan *plan = calloc(1, sizeof *plan);
  if (!plan) dsa_fail(DSA_TVM_OUT_OF_MEMORY, "plan: no memory for a plan");
  return plan;
}

void dsa_tvm_plan_destroy(dsa_tvm_plan *plan) { free(plan); }

dsa_tvm_status dsa_tvm_prepare(dsa_tvm_plan *plan, const char *op, const dsa_tvm_tensor *const *inputs,
                               int32_t num_inputs, const dsa_tvm_attr *attrs, int32_t num_attrs, int64_t (*shapes)[3],
                               int32_t num_outputs, uint64_t *workspace_size) {
  if (!plan) return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "plan: expected one to fill, got a null pointer");
  plan->call.op = NULL;
  if (!workspace_size)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "workspace_size: expected an address, got a null pointer");
  int i = find(op, inputs, num_inputs, attrs, num_attrs, shapes, &num_outputs);
  if (i < 0) return DSA_TVM_INVALID_ARGUMENT;
  struct dsa_call call = {.op = &dsa_ops[i], .takes_cuda = dsa_has_cuda};
  dsa_tvm_status status = dsa_check_inputs(&call, inputs, attrs);
  uint64_t bytes = 0;
  if (status == DSA_TVM_OK && call.device_type == CUDA_DEVICE) status = dsa_cuda_workspace(&call, 0, &bytes);
  if (status != DSA_TVM_OK) return status;
  for (int j = 0; j < num_outputs; j++) dsa_output_shape(&call, j, shapes[j]);
  *workspace_size = plan->workspace = bytes;
  plan->call = call;
  return DSA_TVM_OK;
}

dsa_tvm_status dsa_tvm_run(const dsa_tvm_plan *plan, dsa_tvm_tensor *const *outputs, int32_t num_outputs,
                           const dsa_tvm_options *options) {
  if (!plan || !plan->call.op)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "plan: expected one that dsa_tvm_prepare has filled, got %s",
                    plan ? "an empty one" : "a null pointer");
  const struct op_spec *op = plan->call.op;
  if (num_outputs != op->num_outputs)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: expected %d outputs, got %d", op->name, op->num_outputs,
                    (int)num_outputs);
  if (!outputs)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: expected an array of outputs, got a null pointer", op->name);
  dsa_tvm_options how;
  dsa_tvm_status status = read_options(op->name, options, &how);
  if (status != DSA_TVM_OK) return status;
  struct dsa_call call = plan->call; /* several threads may run a plan, each with its own outputs */
  return compute(&call, &plan->workspace, outputs, &how);
}

#define INPUTS(...) ((const dsa_tvm_tensor *const[]){__VA_ARGS__})
#define OUTPUTS(...) ((dsa_tvm_tensor *const[]){__VA_ARGS__})
#define ATTRS(...) ((const dsa_tvm_attr[]){__VA_ARGS__})

dsa_tvm_status dsa_tvm_lightning_indexer(const dsa_tvm_tensor *q, const dsa_tvm_tensor *k,
                                         const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks,
                                         const dsa_tvm_tensor *ke, const dsa_tvm_tensor *k_scale,
                                         dsa_tvm_tensor *logits, const dsa_tvm_options *options) {
  return execute(OP_LIGHTNING_INDEXER, INPUTS(q, k, weights, ks, ke, k_scale), NULL, OUTPUTS(logits), options);
}

dsa_tvm_status dsa_tvm_topk(const dsa_tvm_tensor *logits, const dsa_tvm_tensor *ks, const dsa_tvm_tensor *ke,
                            int64_t topk, dsa_tvm_tensor *indices, const dsa_tvm_options *options) {
  return execute(OP_TOPK, INPUTS(logits, ks, ke), ATTRS({.i = topk}), OUTPUTS(indices), options);
}

dsa_tvm_status dsa_tvm_indexer_topk(const dsa_tvm_tensor *q, const dsa_tvm_tensor *k, const dsa_tvm_tensor *weights,
                                    const dsa_tvm_tensor *ks, const dsa_tvm_tensor *ke, const dsa_tvm_tensor *k_scale,
                                    int64_t topk, dsa_tvm_tensor *indices, const dsa_tvm_options *options) {
  return execute(OP_INDEXER_TOPK, INPUTS(q, k, weights, ks, ke, k_scale), ATTRS({.i = topk}), OUTPUTS(indices),
                 options);
}

dsa_tvm_status dsa_tvm_sparse_mla(const dsa_tvm_tensor *q, const dsa_tvm_tensor *kv, const dsa_tvm_tensor *indices,
                                  const dsa_tvm_tensor *attn_sink, const dsa_tvm_tensor *topk_length, double sm_scale,
                                  int64_t d_v, dsa_tvm_tensor *out, dsa_tvm_tensor *max_logits, dsa_tvm_tensor *lse,
                                  const dsa_tvm_options *options) {
  return execute(OP_SPARSE_MLA, INPUTS(q, kv, indices, attn_sink, topk_length), ATTRS({.f = sm_scale}, {.i = d_v}),
                 OUTPUTS(out, max_logits, lse), options);
}

dsa_tvm_status dsa_tvm_sparse_mla_fp8(const dsa_tvm_tensor *q, const dsa_tvm_tensor *kv, const dsa_tvm_tensor *indices,
                                      const dsa_tvm_tensor *attn_sink, const dsa_tvm_tensor *topk_length,
                                      double sm_scale, int64_t d_v, dsa_tvm_tensor *out, dsa_tvm_tensor *max_logits,
                                      dsa_tvm_tensor *lse, const dsa_tvm_options *options) {
  return execute(OP_SPARSE_MLA_FP8, INPUTS(q, kv, indices, attn_sink, topk_length), ATTRS({.f = sm_scale}, {.i = d_v}),
                 OUTPUTS(out, max_logits, lse), options);
}

dsa_tvm_status dsa_tvm_write_rows(const dsa_tvm_tensor *cache, const dsa_tvm_tensor *rows,
                                  const dsa_tvm_tensor *positions, dsa_tvm_tensor *out,
                                  const dsa_tvm_options *options) {
  return execute(OP_WRITE_ROWS, INPUTS(cache, rows, positions), NULL, OUTPUTS(out), options);
}

dsa_tvm_status dsa_tvm_dsa_attention(const dsa_tvm_tensor *index_q, const dsa_tvm_tensor *index_k,
                                     const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks, const dsa_tvm_tensor *ke,
                                     const dsa_tvm_tensor *q, const dsa_tvm_tensor *kv,
                                     const dsa_tvm_tensor *index_k_scale, const dsa_tvm_tensor *attn_sink,
                                     int64_t topk, double sm_scale, int64_t d_v, dsa_tvm_tensor *out,
                                     dsa_tvm_tensor *lse, const dsa_tvm_options *options) {
  return execute(OP_DSA_ATTENTION, INPUTS(index_q, index_k, weights, ks, ke, q, kv, index_k_scale, attn_sink),
                 ATTRS({.i = topk}, {.f = sm_scale}, {.i = d_v}), OUTPUTS(out, lse), options);
}

enum { MOST_SECONDS = 3600 };
static const int64_t MOST_READ = (int64_t)1 << 40;

/* What the two measurements have in common. */
static dsa_tvm_status check_measurement(const char *name, int32_t num_threads, double seconds, const double *rate) {
  if (num_threads < 0)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: num_threads: expected 0 or more, got %d", name, (int)num_threads);
  if (!(seconds >= 0 && seconds <= MOST_SECONDS))
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: seconds: expected 0..%d, got %g", name, MOST_SECONDS, seconds);
  if (!rate) return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: rate: expected an address, got a null pointer", name);
  return dsa_kernels() ? DSA_TVM_OK : DSA_TVM_UNSUPPORTED;
}

dsa_tvm_status dsa_tvm_peak(const char *dtype, int32_t num_threads, double seconds, double *rate) {
  static const char *const names[DSA_NUM_PRODUCTS] = {"float32", "bfloat16", "int8"};
  int product = 0;
  while (product < DSA_NUM_PRODUCTS && !(dtype && !strcmp(dtype, names[product]))) product++;
  if (product == DSA_NUM_PRODUCTS)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "peak: dtype: expected float32, bfloat16 or int8, got %.64s",
                    dtype ? dtype : "a null pointer");
  dsa_tvm_status status = check_measurement("peak", num_threads, seconds, rate);
  if (status != DSA_TVM_OK) return status;
  const char *target = dsa_kernels()->target;
  double reached = dsa_peak(target, product, dsa_pool_executor(num_threads).threads, seconds);
  if (reached == 0)
    return dsa_fail(DSA_TVM_UNSUPPORTED, "peak: dtype: expected one that %s multiplies by, got %s", target, dtype);
  *rate = reached;
  return DSA_TVM_OK;
}

dsa_tvm_status dsa_tvm_read_rate(int64_t bytes, int32_t num_threads, double seconds, double *rate) {
  if (bytes < 1 || bytes > MOST_READ)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "read_rate: bytes: expected 1..%lld, got %lld", (long long)MOST_READ,
                    (long long)bytes);
  dsa_tvm_status status = check_measurement("read_rate", num_threads, seconds, rate);
  if (status != DSA_TVM_OK) return status;
  double reached = dsa_read_rate(dsa_kernels()->target, bytes, dsa_pool_executor(num_threads).threads, seconds);
  if (reached == 0)
    return dsa_fail(DSA_TVM_OUT_OF_MEMORY, "read_rate: bytes: no memory for %lld", (long long)bytes);
  *rate = reached;
  return DSA_TVM_OK;
}
