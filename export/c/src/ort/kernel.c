/* Runs a node of ONNX Runtime: reads its attributes, views its values as tensors, uses the session's threads. */
#include <stdlib.h>

#include "ort/ort.h"

OrtStatus *dsa_ort_status(const OrtApi *api, dsa_tvm_status status) {
  static const int codes[] = {[DSA_TVM_INVALID_ARGUMENT] = ORT_INVALID_ARGUMENT,
                              [DSA_TVM_OUT_OF_MEMORY] = ORT_FAIL,
                              [DSA_TVM_UNSUPPORTED] = ORT_NOT_IMPLEMENTED,
                              [DSA_TVM_INTERNAL] = ORT_FAIL};
  return status == DSA_TVM_OK ? NULL : api->CreateStatus(codes[status], dsa_tvm_last_error());
}

/* The kernel of a node. */
struct kernel {
  const struct ort_runtime *runtime;
  const struct op_spec *spec;
  int on_gpu;
  dsa_tvm_attr attrs[MAX_ATTRS];
};

static OrtStatus *read_attr(const OrtApi *api, const OrtKernelInfo *info, const struct op_spec *op,
                            const struct attr_spec *spec, dsa_tvm_attr *attr) {
  OrtStatus *status;
  if (spec->is_float) {
    float value = 0;
    status = api->KernelInfoGetAttribute_float(info, spec->name, &value);
    attr->f = value;
  } else {
    status = api->KernelInfoGetAttribute_int64(info, spec->name, &attr->i);
  }
  if (!status) return NULL;
  dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: %s: expected the node to have this attribute as %s (%s)", op->name,
           spec->name, spec->is_float ? "a float" : "an integer", api->GetErrorMessage(status));
  api->ReleaseStatus(status);
  return dsa_ort_status(api, DSA_TVM_INVALID_ARGUMENT);
}

OrtStatus *dsa_ort_create_kernel(const OrtCustomOp *self, const OrtApi *passed, const OrtKernelInfo *info, void **out) {
  (void)passed; /* the interface of the operator's version, which lacks newer functions */
  const struct ort_op *op = (const struct ort_op *)self;
  const OrtApi *api = op->runtime->api;
  *out = NULL;
  if (!op->on_gpu && !dsa_kernels()) return dsa_ort_status(api, DSA_TVM_UNSUPPORTED);
  struct kernel *kernel = calloc(1, sizeof *kernel);
  if (!kernel)
    return dsa_ort_status(api, dsa_fail(DSA_TVM_OUT_OF_MEMORY, "%s: no memory for a kernel", op->spec->name));
  kernel->runtime = op->runtime;
  kernel->spec = op->spec;
  kernel->on_gpu = op->on_gpu;
  for (int i = 0; i < op->spec->num_attrs; i++) {
    OrtStatus *status = read_attr(api, info, op->spec, &op->spec->attrs[i], &kernel->attrs[i]);
    if (!status) continue;
    free(kernel);
    return status;
  }
  *out = kernel;
  return NULL;
}

static OrtStatus *read_shape(const struct ort_runtime *runtime, const OrtValue *value, int *type, int64_t *buffer,
                             const int64_t **shape, size_t *rank) {
  const OrtApi *api = runtime->api;
  if (runtime->minor >= MINOR_WITH_BORROWED_SHAPES)
    return api->GetTensorElementTypeAndShapeDataReference(value, type, shape, rank);
  OrtTensorTypeAndShapeInfo *info;
  OrtStatus *status = api->GetTensorTypeAndShape(value, &info);
  if (status) return status;
  status = api->GetTensorElementType(info, type);
  if (!status) status = api->GetDimensionsCount(info, rank);
  /* A higher rank is refused later, without a look at the shape. */
  if (!status && *rank <= MAX_NDIM) status = api->GetDimensions(info, buffer, *rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  *shape = buffer;
  return status;
}

static dsa_tvm_tensor tensor_of(int onnx_type, const int64_t *shape, size_t rank) {
  dsa_tvm_tensor x = {0};
  x.device.device_type = CPU_DEVICE;
  for (int i = 0; i < NUM_DTYPES; i++)
    if (dsa_dtypes[i].onnx == onnx_type) {
      x.dtype.code = dsa_dtypes[i].code;
      x.dtype.bits = dsa_dtypes[i].bits;
      x.dtype.lanes = 1;
    }
  x.ndim = (int32_t)rank;
  x.shape = (int64_t *)shape;
  return x;
}

/* Runs parallel loops on the threads of the session. */
struct session_pool {
  const OrtApi *api;
  const OrtKernelContext *context;
};

struct loop {
  dsa_task task;
  void *arg;
};

static void run_task(void *arg, size_t index) {
  const struct loop *loop = arg;
  loop->task(loop->arg, (int64_t)index);
}

static void session_for(void *state, int threads, int64_t count, dsa_task task, void *arg) {
  (void)threads; /* the session decides */
  const struct session_pool *pool = state;
  struct loop loop = {task, arg};
  /* With 0 batches, threads take one task after the other, which balances tasks of different lengths. */
  OrtStatus *status = pool->api->KernelContext_ParallelFor(pool->context, run_task, (size_t)count, 0, &loop);
  if (!status) return;
  /* If the pool refuses the work, do it here. Some tasks may run twice, which does no harm. */
  pool->api->ReleaseStatus(status);
  for (int64_t i = 0; i < count; i++) task(arg, i);
}

static struct dsa_executor session_executor(struct session_pool *pool) {
  /* The size of the pool is unknown, so cut the work for all CPUs of the process: too many tasks cost little.
   * OMP_NUM_THREADS is often 1 beside another pool, which would give too few tasks. */
  struct dsa_executor executor = {dsa_process_cpus(), session_for, pool};
  return executor;
}

/* The number of the GPU that a value is on. */
static OrtStatus *gpu_of(const OrtApi *api, const OrtValue *value, int32_t *device_id) {
  const OrtMemoryInfo *info;
  int id = 0;
  OrtStatus *status = api->GetTensorMemoryInfo(value, &info);
  if (!status) status = api->MemoryInfoGetId(info, &id);
  *device_id = id;
  return status;
}

/* Enqueues a checked call on the session's stream. Its workspace does not come from the session. Calls of a session may
 * run at a time, each on its own stream. The session's allocator is not told the stream, so it would hand out memory
 * that kernels of another call still use. Its scratch buffers belong to a stream, but they end the process if there is
 * no memory left. */
static OrtStatus *run_on_gpu(const OrtApi *api, const OrtKernelContext *context, const struct dsa_call *call) {
  void *stream = NULL;
  OrtStatus *status = api->KernelContext_GetGPUComputeStream(context, &stream);
  return status ? status : dsa_ort_status(api, dsa_cuda_run_pooled(call, stream));
}

OrtStatus *dsa_ort_compute(void *state, OrtKernelContext *context) {
  const struct kernel *kernel = state;
  const OrtApi *api = kernel->runtime->api;
  const struct op_spec *op = kernel->spec;
  struct dsa_call call = {.op = op, .takes_cuda = kernel->on_gpu};
  int32_t gpu = -1;
  dsa_tvm_tensor tensors[MAX_INPUTS > MAX_OUTPUTS ? MAX_INPUTS : MAX_OUTPUTS];
  const dsa_tvm_tensor *inputs[MAX_INPUTS] = {0};
  dsa_tvm_tensor *outputs[MAX_OUTPUTS] = {0};
  int64_t shapes[MAX_INPUTS][MAX_NDIM], output_shapes[MAX_OUTPUTS][MAX_NDIM];
  size_t count;
  OrtStatus *status = api->KernelContext_GetInputCount(context, &count);
  if (status) return status;
  for (int i = 0; i < op->num_inputs && (size_t)i < count; i++) {
    const OrtValue *value = NULL;
    const int64_t *shape = NULL;
    size_t rank = 0;
    int type = 0;
    if ((status = api->KernelContext_GetInput(context, (size_t)i, &value))) return status;
    if (!value) continue;
    if ((status = read_shape(kernel->runtime, value, &type, shapes[i], &shape, &rank))) return status;
    tensors[i] = tensor_of(type, shape, rank);
    if (kernel->on_gpu) {
      if (gpu < 0 && (status = gpu_of(api, value, &gpu))) return status;
      tensors[i].device.device_type = CUDA_DEVICE;
      tensors[i].device.device_id = gpu;
    }
    if ((status = api->GetTensorMutableData((OrtValue *)value, &tensors[i].data))) return status;
    inputs[i] = &tensors[i];
  }
  /* Check the inputs before outputs are allocated: a wrong shape must be reported, and not size an output. */
  if ((status = dsa_ort_status(api, dsa_check_inputs(&call, inputs, kernel->attrs)))) return status;
  for (int i = 0; i < op->num_outputs; i++) {
    const struct tensor_spec *spec = &op->outputs[i];
    OrtValue *value = NULL;
    dsa_output_shape(&call, i, output_shapes[i]);
    if ((status = api->KernelContext_GetOutput(context, (size_t)i, output_shapes[i], (size_t)spec->ndim, &value)))
      return status;
    if (!value) continue;
    int type = spec->dtype >= 0 ? spec->dtype : call.type[-1 - spec->dtype];
    tensors[i] = tensor_of(dsa_dtypes[type].onnx, output_shapes[i], (size_t)spec->ndim);
    tensors[i].device.device_type = call.device_type;
    tensors[i].device.device_id = call.device_id;
    if ((status = api->GetTensorMutableData(value, &tensors[i].data))) return status;
    outputs[i] = &tensors[i];
  }
  if ((status = dsa_ort_status(api, dsa_check_outputs(&call, outputs)))) return status;
  if (kernel->on_gpu) return run_on_gpu(api, context, &call);
  struct session_pool pool = {api, context};
  struct dsa_executor executor = session_executor(&pool);
  return dsa_ort_status(api, dsa_run(&call, &executor));
}
