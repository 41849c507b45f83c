/* Which device a call is on, and what that asks of its tensors and its workspace. */
#include <stdio.h>

#include "internal.h"

#define INVALID(...) dsa_fail(DSA_TVM_INVALID_ARGUMENT, __VA_ARGS__)

/* There is one CPU, whatever its number. */
static int is_on(const dsa_tvm_tensor *x, int32_t type, int32_t id) {
  return (int32_t)x->device.device_type == type && (type == CPU_DEVICE || x->device.device_id == id);
}

void dsa_find_device(struct dsa_call *call, const dsa_tvm_tensor *const *inputs) {
  int n = call->op->num_inputs, most = 0;
  call->device_type = CPU_DEVICE;
  call->device_id = 0;
  /* It is the odd one out that an error should name. */
  for (int i = 0; call->takes_cuda && i < n && 2 * most <= n; i++) {
    int count = 0;
    for (int j = 0; inputs[i] && j < n; j++)
      count += inputs[j] && is_on(inputs[j], (int32_t)inputs[i]->device.device_type, inputs[i]->device.device_id);
    if (count <= most) continue;
    most = count;
    call->device_type = (int32_t)inputs[i]->device.device_type;
    call->device_id = call->device_type == CPU_DEVICE ? 0 : inputs[i]->device.device_id;
  }
}

static const char *device_text(char text[32], int32_t type, int32_t id) {
  if (type == CPU_DEVICE)
    snprintf(text, 32, "the CPU");
  else if (type == CUDA_DEVICE)
    snprintf(text, 32, "CUDA device %d", (int)id);
  else
    snprintf(text, 32, "DLPack device %d", (int)type);
  return text;
}

dsa_tvm_status dsa_check_device(const struct dsa_call *call, const struct tensor_spec *spec, const dsa_tvm_tensor *x) {
  const char *op = call->op->name;
  int32_t type = (int32_t)x->device.device_type;
  char want[32], got[32];
  if (!call->takes_cuda) {
    if (type == CPU_DEVICE) return DSA_TVM_OK;
    return INVALID("%s: %s: expected a tensor on the CPU, got one on %s%s", op, spec->name,
                   device_text(got, type, x->device.device_id),
                   type == CUDA_DEVICE ? "; dsa-tvm build --target cuda makes a library that takes it" : "");
  }
  if (call->device_type != CPU_DEVICE && call->device_type != CUDA_DEVICE)
    return INVALID("%s: %s: expected a tensor on the CPU or on a CUDA GPU, got one on %s", op, spec->name,
                   device_text(got, type, x->device.device_id));
  if (is_on(x, call->device_type, call->device_id)) return DSA_TVM_OK;
  return INVALID("%s: %s: expected a tensor on %s like the others, got one on %s", op, spec->name,
                 device_text(want, call->device_type, call->device_id), device_text(got, type, x->device.device_id));
}

dsa_tvm_status dsa_check_workspace(const struct dsa_call *call, const dsa_tvm_options *options, uint64_t needed) {
  const char *op = call->op->name;
  if (!needed) return DSA_TVM_OK;
  uint64_t given = options->workspace ? options->workspace_size : 0;
  if (given < needed)
    return INVALID("%s: workspace: expected at least %llu bytes on CUDA device %d (dsa_tvm_workspace_size tells how "
                   "many), got %llu",
                   op, (unsigned long long)needed, (int)call->device_id, (unsigned long long)given);
  if ((uintptr_t)options->workspace % CUDA_ALIGNMENT)
    return INVALID("%s: workspace: expected an address that is a multiple of %d, got %p", op, CUDA_ALIGNMENT,
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
