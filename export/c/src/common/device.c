/* Which device a call is on, and whether its tensors are there. */
#include <stdio.h>

#include "common/internal.h"

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
