/* The workspace of a call on a GPU. */
#ifndef DSA_TVM_CUDA_WORKSPACE_H_
#define DSA_TVM_CUDA_WORKSPACE_H_

#include "cuda/kernels.h"

/* The next bytes of the workspace, aligned as it is. What is taken goes back by setting call->used to what it was before:
 * whatever is enqueued later may have it, for a stream is in order. */
void *dsa_cuda_take(struct cuda_call *call, uint64_t bytes);

/* Whether the caller's workspace is large enough for call->peak, aligned, and the call's own. */
dsa_tvm_status dsa_cuda_check_workspace(const struct cuda_call *call, const dsa_tvm_options *options);

#endif
