/* Memory for the workspace of a call that does not bring its own. */
#ifndef DSA_TVM_CUDA_POOL_H_
#define DSA_TVM_CUDA_POOL_H_

#include "cuda/kernels.h"

/* Use these between dsa_cuda_begin and dsa_cuda_end. Both are enqueued on the call's stream and wait for nothing, even
 * in a capture. The address is 0 after a failure. Give memory back after enqueuing the last kernel that uses it. */
dsa_tvm_status dsa_cuda_pool_take(const struct cuda_call *call, uint64_t bytes, uint64_t *address);
void dsa_cuda_pool_give_back(const struct cuda_call *call, uint64_t address);

#endif
