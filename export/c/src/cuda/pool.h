/* Memory for the workspace of a call that brings none. */
#ifndef DSA_TVM_CUDA_POOL_H_
#define DSA_TVM_CUDA_POOL_H_

#include "cuda/kernels.h"

/* Between dsa_cuda_begin and dsa_cuda_end: enqueued on the call's stream, waiting for nothing, also in a capture. What was
 * taken, 0 on failure, is given back behind the last kernel that uses it. */
dsa_tvm_status dsa_cuda_pool_take(const struct cuda_call *call, uint64_t bytes, uint64_t *address);
void dsa_cuda_pool_give_back(const struct cuda_call *call, uint64_t address);

#endif
