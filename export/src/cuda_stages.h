/* The stages that the operators on a GPU are made of. Each takes what it needs of the workspace, and then launches its
 * kernels unless the call is only being measured. */
#ifndef DSA_TVM_CUDA_STAGES_H_
#define DSA_TVM_CUDA_STAGES_H_

#include "cuda.h"

/* Rows of logits, the first of them and of everything else at the pointers, and where their indices go. */
struct cuda_selection {
  const void *logits, *ks, *ke;
  void *indices;
  int64_t rows, s_kv, topk;
};
dsa_tvm_status dsa_cuda_select(struct cuda_call *c, const struct cuda_selection *s);

#endif
