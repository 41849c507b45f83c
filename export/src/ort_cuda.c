/* A node of ONNX Runtime on a GPU: on the session's stream, with a workspace from the session's memory. */
#include "ort.h"

OrtStatus *dsa_ort_gpu_of(const OrtApi *api, const OrtValue *value, int32_t *device_id) {
  const OrtMemoryInfo *info;
  int id = 0;
  OrtStatus *status = api->GetTensorMemoryInfo(value, &info);
  if (!status) status = api->MemoryInfoGetId(info, &id);
  *device_id = id;
  return status;
}

/* Memory of the session that has to be given back to `allocator`. Calls of a session may run at a time, each on a stream
 * of its own: what is asked for without naming a stream may be what another call gave back before its kernels were done
 * with it. A scratch buffer is the stream's. Where there is none, kernels are on the default stream, those of all. */
static OrtStatus *take_workspace(const OrtApi *api, const OrtKernelContext *context, const OrtValue *value,
                                 dsa_tvm_options *options, OrtAllocator **allocator) {
  const OrtMemoryInfo *info;
  size_t size = (size_t)options->workspace_size;
  OrtStatus *status = api->GetTensorMemoryInfo(value, &info);
  if (!status) status = api->KernelContext_GetAllocator(context, info, allocator);
  if (status) return status;
  return options->stream ? api->KernelContext_GetScratchBuffer(context, info, size, &options->workspace)
                         : api->AllocatorAlloc(*allocator, size, &options->workspace);
}

OrtStatus *dsa_ort_run_on_gpu(const OrtApi *api, const OrtKernelContext *context, const OrtValue *value,
                              const struct dsa_call *call) {
  dsa_tvm_options options = {.size = sizeof options};
  OrtAllocator *allocator = NULL;
  OrtStatus *status = dsa_ort_status(api, dsa_cuda_workspace(call, &options.workspace_size));
  if (!status) status = api->KernelContext_GetGPUComputeStream(context, &options.stream);
  if (!status && options.workspace_size) status = take_workspace(api, context, value, &options, &allocator);
  if (!status) status = dsa_ort_status(api, dsa_cuda_run(call, &options));
  /* Whoever gets the memory next is enqueued later on the same stream, or waits for it. */
  if (options.workspace) {
    OrtStatus *failed = api->AllocatorFree(allocator, options.workspace);
    if (failed) api->ReleaseStatus(failed);
  }
  if (allocator) api->ReleaseAllocator(allocator);
  return status;
}
