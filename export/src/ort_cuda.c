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

static OrtStatus *allocator_of(const OrtApi *api, const OrtKernelContext *context, const OrtValue *value,
                               OrtAllocator **allocator) {
  const OrtMemoryInfo *info;
  OrtStatus *status = api->GetTensorMemoryInfo(value, &info);
  return status ? status : api->KernelContext_GetAllocator(context, info, allocator);
}

OrtStatus *dsa_ort_run_on_gpu(const OrtApi *api, const OrtKernelContext *context, const OrtValue *value,
                              const struct dsa_call *call) {
  dsa_tvm_options options = {.size = sizeof options};
  OrtAllocator *allocator = NULL;
  OrtStatus *status = dsa_ort_status(api, dsa_cuda_workspace(call, &options.workspace_size));
  if (!status) status = api->KernelContext_GetGPUComputeStream(context, &options.stream);
  if (!status && options.workspace_size) {
    status = allocator_of(api, context, value, &allocator);
    if (!status) status = api->AllocatorAlloc(allocator, (size_t)options.workspace_size, &options.workspace);
  }
  if (!status) status = dsa_ort_status(api, dsa_cuda_run(call, &options));
  /* The session hands the memory to nodes that are enqueued later on the same stream. */
  if (options.workspace) {
    OrtStatus *failed = api->AllocatorFree(allocator, options.workspace);
    if (failed) api->ReleaseStatus(failed);
  }
  if (allocator) api->ReleaseAllocator(allocator);
  return status;
}
