/* Declarations that the files for ONNX Runtime share. */
#ifndef DSA_TVM_ORT_H_
#define DSA_TVM_ORT_H_

#include "common/internal.h"
#include "ort/abi.h"

enum { MINOR_WITH_BORROWED_SHAPES = 24 }; /* the newest interface asked for */

/* One ONNX Runtime in the process, and what was registered with it. There may be several of different versions. */
struct ort_runtime {
  const OrtApi *api;
  int minor; /* of its version 1.minor */
  OrtCustomOpDomain *domain;
  struct ort_op *ops;
  struct ort_runtime *next;
};

/* An operator with one choice of element types. */
struct ort_op {
  OrtCustomOp base;
  const struct ort_runtime *runtime;
  const struct op_spec *spec;
  const int8_t *types; /* of the type variables */
  int on_gpu;          /* for CUDAExecutionProvider */
};

/* schema.c: names, types, optional inputs and shape inference; the kernel's functions are left to the caller. */
void dsa_ort_describe(struct ort_op *op, const struct ort_runtime *runtime, const struct op_spec *spec,
                      const int8_t *types, int on_gpu);

/* kernel.c: our status, with dsa_tvm_last_error()'s text, as one of ONNX Runtime's; and what a node runs. */
OrtStatus *dsa_ort_status(const OrtApi *api, dsa_tvm_status status);
OrtStatus *dsa_ort_create_kernel(const OrtCustomOp *self, const OrtApi *passed, const OrtKernelInfo *info, void **out);
OrtStatus *dsa_ort_compute(void *state, OrtKernelContext *context);

#endif
