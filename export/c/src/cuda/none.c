/* In the place of the CUDA side in a library that was built without it: the checks let no call get here. */
#include "common/internal.h"

const int dsa_has_cuda = 0;

static dsa_tvm_status refuse(void) {
  return dsa_fail(DSA_TVM_UNSUPPORTED,
                  "this library has no CUDA kernels; dsa-tvm build --target cuda makes one with them");
}

const char *dsa_tvm_cuda_archs(void) {
  refuse();
  return NULL;
}

dsa_tvm_status dsa_cuda_workspace(const struct dsa_call *call, int any_address, uint64_t *bytes) {
  (void)call, (void)any_address, (void)bytes;
  return refuse();
}

dsa_tvm_status dsa_cuda_run_pooled(const struct dsa_call *call, void *stream) {
  (void)call, (void)stream;
  return refuse();
}

dsa_tvm_status dsa_cuda_run(const struct dsa_call *call, const uint64_t *known, const dsa_tvm_options *options) {
  (void)call, (void)known, (void)options;
  return refuse();
}
