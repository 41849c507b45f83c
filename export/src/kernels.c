/* Calls of compiled kernels, and the few services their code asks of its host. */
#include <stdio.h>
#include <stdlib.h>

#include "internal.h"

static _Thread_local char kernel_message[512];
static _Thread_local int out_of_memory;

/* The one function TVM's generated code links to: it reports a failed check of its own. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts) {
  size_t used = (size_t)snprintf(kernel_message, sizeof kernel_message, "%s: ", kind);
  for (int32_t i = 0; i < num_parts && used < sizeof kernel_message; i++)
    if (parts[i]) used += (size_t)snprintf(kernel_message + used, sizeof kernel_message - used, "%s", parts[i]);
}

static void *allocate(int device_type, int device_id, uint64_t bytes, int type_code, int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  /* 64: what the generated code assumes of a workspace. A size near 2**64 must not wrap to a small one. */
  void *p = bytes < UINT64_MAX / 2 ? aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64)) : NULL;
  if (!p) out_of_memory = 1;
  return p;
}

static int release(int device_type, int device_id, void *p) {
  (void)device_type, (void)device_id;
  free(p);
  return 0;
}

/* Pointers the generated code calls through; the objects define those that they use. */
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void *) __attribute__((weak));

__attribute__((constructor)) static void offer_services(void) {
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;
}

struct tvm_any dsa_arg_tensor(dsa_tvm_tensor *tensor) {
  struct tvm_any any = {TVM_TENSOR_POINTER, 0, {.p = tensor}};
  return any;
}

struct tvm_any dsa_arg_int(int64_t value) {
  struct tvm_any any = {TVM_INT, 0, {.i = value}};
  return any;
}

struct tvm_any dsa_arg_float(double value) {
  struct tvm_any any = {TVM_FLOAT, 0, {.f = value}};
  return any;
}

void dsa_call_kernel(struct dsa_outcome *outcome, dsa_kernel kernel, const struct tvm_any *args, int num_args) {
  struct tvm_any result = {0, 0, {0}};
  kernel_message[0] = '\0';
  out_of_memory = 0;
  /* A library made for measuring lacks most kernels. */
  if (!kernel) snprintf(kernel_message, sizeof kernel_message, "no kernel for these element types in this library");
  if (kernel && kernel(NULL, args, num_args, &result) == 0) return;
  /* Several tasks may fail at once; the first one's message is kept. */
#pragma omp critical(dsa_outcome)
  if (!outcome->failed) {
    outcome->failed = 1;
    outcome->status = out_of_memory ? DSA_TVM_OUT_OF_MEMORY : DSA_TVM_INTERNAL;
    snprintf(outcome->message, sizeof outcome->message, "%s",
             out_of_memory ? "no memory for the workspace of a task" : kernel_message);
  }
}
