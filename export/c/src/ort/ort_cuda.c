/* A node of ONNX Runtime on a GPU: on the session's stream. */
#include "ort.h"

OrtStatus *dsa_ort_gpu_of(const OrtApi *api, const OrtValue *value, int32_t *device_id) {
  const OrtMemoryInfo *info;
  int id = 0;
  OrtStatus *status = api->GetTensorMemoryInfo(value, &info);
  if (!status) status = api->MemoryInfoGetId(info, &id);
  *device_id = id;
  return status;
}

/* The workspace is none of the session's memory. Calls of a session may run at a time, each on a stream of its own: its
 * allocator, which is not told the stream, hands out what another call gave back before its kernels were done with it;
 * and its scratch buffers, which are the stream's, end the process where there is no memory left. */
OrtStatus *dsa_ort_run_on_gpu(const OrtApi *api, const OrtKernelContext *context, const struct dsa_call *call) {
  void *stream = NULL;
  OrtStatus *status = api->KernelContext_GetGPUComputeStream(context, &stream);
  return status ? status : dsa_ort_status(api, dsa_cuda_run_pooled(call, stream));
}
