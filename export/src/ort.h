/* What the two halves of the ONNX Runtime door share. */
#ifndef DSA_TVM_ORT_H_
#define DSA_TVM_ORT_H_

#include "internal.h"
#include "ort_abi.h"

/* One ONNX Runtime in the process, and what was registered with it. There may be several, of different versions. */
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
};

/* ort_schema.c: names, types, optional inputs and shape inference; the kernel's functions are left to the caller. */
void dsa_ort_describe(struct ort_op *op, const struct ort_runtime *runtime, const struct op_spec *spec,
                      const int8_t *types);

#endif
