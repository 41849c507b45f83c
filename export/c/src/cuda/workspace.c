/* The workspace of a call on a GPU: what the stages take of it, and what it must be. */
#include "cuda/workspace.h"

#define INVALID(...) dsa_fail(DSA_TVM_INVALID_ARGUMENT, __VA_ARGS__)

/* In bytes; what the public header asks for. */
enum { ALIGNMENT = 256 };

void *dsa_cuda_take(struct cuda_call *call, uint64_t bytes) {
  char *taken = call->measuring ? NULL : call->workspace + call->used;
  call->used += (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
  if (call->used > call->peak) call->peak = call->used;
  return taken;
}

dsa_tvm_status dsa_cuda_check_workspace(const struct cuda_call *c, const dsa_tvm_options *options) {
  const struct dsa_call *call = c->call;
  uint64_t needed = c->peak;
  const char *op = call->op->name;
  if (!needed) return DSA_TVM_OK;
  uint64_t given = options->workspace ? options->workspace_size : 0;
  if (given < needed)
    return INVALID("%s: workspace: expected at least %llu bytes on CUDA device %d (dsa_tvm_workspace_size tells how "
                   "many), got %llu",
                   op, (unsigned long long)needed, (int)call->device_id, (unsigned long long)given);
  if ((uintptr_t)options->workspace % ALIGNMENT)
    return INVALID("%s: workspace: expected an address that is a multiple of %d, got %p", op, ALIGNMENT,
                   options->workspace);
  if (needed > UINTPTR_MAX - (uintptr_t)options->workspace)
    return INVALID("%s: workspace: expected memory below the end of the address space, got %llu bytes at %p", op,
                   (unsigned long long)needed, options->workspace);
  int64_t length = (int64_t)needed;
  dsa_tvm_tensor memory = {.data = options->workspace, .ndim = 1, .dtype = {DSA_TVM_INT, 8, 1}, .shape = &length};
  const char *shared = NULL;
  for (int i = 0; i < call->op->num_inputs; i++)
    if (call->present[i] && dsa_overlap(&memory, &call->in[i])) shared = call->op->inputs[i].name;
  for (int i = 0; i < call->op->num_outputs; i++)
    if (dsa_overlap(&memory, &call->out[i])) shared = call->op->outputs[i].name;
  if (shared) return INVALID("%s: workspace: expected memory that does not overlap `%s`, got an overlap", op, shared);
  return DSA_TVM_OK;
}
