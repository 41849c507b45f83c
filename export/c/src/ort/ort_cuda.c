/* Runs a node of ONNX Runtime on a GPU, on the stream of the session. */
#include "ort.h"

OrtStatus *dsa_ort_gpu_of(const OrtApi *api, const OrtValue *value, int32_t *device_id) {
  const OrtMemoryInfo *info;
  int id = 0;
  OrtStatus *status = api->GetTensorMemoryInfo(value, &info);
  if (!status) status = api->MemoryInfoGetId(info, &id);
  *device_id = id;
  return status;
}

/* The workspace does not come from the session. Several calls of a session may run at a time, each on its own stream.
 * The session's allocator is not told the stream, so it may hand out memory that kernels of another call still use. Its
 * scratch buffers belong to a stream, but they end the process when there is no memory left. */
OrtStatus *dsa_ort_run_on_gpu(const OrtApi *api, const OrtKernelContext *context, const struct dsa_call *call) {
  void *stream = NULL;
  OrtStatus *status = api->KernelContext_GetGPUComputeStream(context, &stream);
  return status ? status : dsa_ort_status(api, dsa_cuda_run_pooled(call, stream));
}
