/* GPUs: finds their properties, loads kernels, and launches them. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda/kernels.h"
#include "cuda/driver.h"

const char *dsa_tvm_cuda_archs(void) {
  static _Thread_local char text[256];
  size_t used = 0;
  for (int i = 0; i < dsa_num_cuda_sets; i++)
    for (const struct cuda_arch *arch = dsa_cuda_sets[i].archs; arch->number && used < sizeof text; arch++)
      used += (size_t)snprintf(text + used, sizeof text - used, "sm_%d%s,", arch->number, arch->exact ? "a" : "");
  for (int i = 0; i < dsa_num_cuda_sets && used < sizeof text; i++)
    if (dsa_cuda_sets[i].ptx) snprintf(text + used, sizeof text - used, "compute_%d", dsa_cuda_sets[i].ptx);
  return text;
}

/* A device, and its kernels. */
static struct device {
  struct cuda_device properties;
  cu_device handle;
  cu_context primary;
  const cu_kernel *kernels; /* those of its set; NULL until they are ready on this device */
  int *resident;            /* by kernel: blocks for which a multiprocessor has threads and registers */
  char refusal[256];        /* why this library can never run on it; "" if it can */
} devices[MAX_DEVICES];
static pthread_mutex_t devices_lock = PTHREAD_MUTEX_INITIALIZER;

/* The loaded kernels of a set. Their handles are valid in every context, so all devices of a set share them. With
 * CUDA_MODULE_LOADING=EAGER the driver copies each library to every context, so it must be loaded only once. */
struct loaded {
  int num_libraries;
  cu_library *libraries;
  cu_kernel *kernels;
};
static struct loaded *loaded; /* by set */

/* The driver's rule: machine code runs on its architecture and on later ones of the same generation, unless it is for
 * that architecture alone. Tegra GPUs run only code for their own architecture, and no other GPU runs theirs. */
static int is_tegra(int number) {
  for (const int *tegra = dsa_cuda_tegra; *tegra; tegra++)
    if (*tegra == number) return 1;
  return 0;
}
static int runs_on(const struct cuda_arch *arch, int capability) {
  if (arch->exact || is_tegra(capability) || is_tegra(arch->number)) return arch->number == capability;
  return arch->number / 10 == capability / 10 && arch->number <= capability;
}

/* Code for exactly this GPU is preferred. If no machine code runs on it, a set with PTX is taken. */
static const struct cuda_set *set_for(int capability) {
  const struct cuda_set *found = NULL;
  int best = 0;
  for (int i = 0; i < dsa_num_cuda_sets; i++)
    for (const struct cuda_arch *arch = dsa_cuda_sets[i].archs; arch->number; arch++)
      if (runs_on(arch, capability) && 2 * arch->number + arch->exact > best) {
        best = 2 * arch->number + arch->exact;
        found = &dsa_cuda_sets[i];
      }
  for (int i = 0; i < dsa_num_cuda_sets && !found; i++)
    if (dsa_cuda_sets[i].ptx && dsa_cuda_sets[i].ptx <= capability) found = &dsa_cuda_sets[i];
  return found;
}

static cu_result find_properties(struct device *d, int ordinal) {
  struct cuda_device *p = &d->properties;
  int major = 0, minor = 0;
  cu_result error = dsa_cu.cuDeviceGet(&d->handle, ordinal);
  if (!error)
    error = dsa_cu.cuDeviceGetAttribute(&p->multiprocessors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, d->handle);
  if (!error) error = dsa_cu.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, d->handle);
  if (!error) error = dsa_cu.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, d->handle);
  if (!error)
    error = dsa_cu.cuDeviceGetAttribute(&p->shared_bytes, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, d->handle);
  p->capability = 10 * major + minor;
  p->set = set_for(p->capability);
  return error;
}

/* Makes a context of the device current, unless the caller's context is one already. */
static cu_result enter(const struct device *d, int *pushed) {
  cu_context context = NULL;
  cu_device current;
  cu_result error = dsa_cu.cuCtxGetCurrent(&context);
  if (!error && context) error = dsa_cu.cuCtxGetDevice(&current);
  if (error || (context && current == d->handle)) return error;
  error = dsa_cu.cuCtxPushCurrent_v2(d->primary);
  *pushed = !error;
  return error;
}

static void unload(struct loaded *l) {
  for (int i = 0; i < l->num_libraries; i++) dsa_cu.cuLibraryUnload(l->libraries[i]);
  free(l->libraries);
  free(l->kernels);
  *l = (struct loaded){0};
}

static cu_result load(struct loaded *l, const struct cuda_set *set) {
  cu_result error = 0;
  int image = -1;
  l->libraries = calloc((size_t)dsa_num_cuda_kernels, sizeof *l->libraries);
  l->kernels = calloc((size_t)dsa_num_cuda_kernels, sizeof *l->kernels);
  if (!l->libraries || !l->kernels) error = CU_OUT_OF_MEMORY;
  for (int k = 0; k < dsa_num_cuda_kernels && !error; k++) {
    if (!set->shapes[k].threads) continue;
    cu_library *library = &l->libraries[l->num_libraries];
    if (dsa_cuda_kernels[k].image != image) {
      image = dsa_cuda_kernels[k].image;
      error = dsa_cu.cuLibraryLoadData(library, set->images[image], NULL, NULL, 0, NULL, NULL, 0);
      if (!error) l->num_libraries++;
    }
    if (!error) error = dsa_cu.cuLibraryGetKernel(&l->kernels[k], l->libraries[l->num_libraries - 1],
                                                  dsa_cuda_kernels[k].name);
  }
  return error;
}

/* Prepares the kernels in the current context, which is on the device. */
static cu_result ready_kernels(const struct device *d, const struct loaded *l, int *resident) {
  const struct cuda_device *p = &d->properties;
  cu_result error = 0;
  for (int k = 0; k < dsa_num_cuda_kernels && !error; k++) {
    cu_function function;
    if (!l->kernels[k]) continue;
    /* Load eagerly: lazy loading at the first launch would break stream capture. */
    error = dsa_cu.cuKernelGetFunction(&function, l->kernels[k]);
    if (!error)
      error = dsa_cu.cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, p->shared_bytes,
                                          l->kernels[k], d->handle);
    if (!error)
      error = dsa_cu.cuOccupancyMaxActiveBlocksPerMultiprocessor(&resident[k], function, p->set->shapes[k].threads, 0);
  }
  return error;
}

static int is_in_use(const struct loaded *l) {
  for (int i = 0; i < MAX_DEVICES; i++)
    if (devices[i].kernels && devices[i].kernels == l->kernels) return 1;
  return 0;
}

/* All or nothing: a failure here leaves no GPU memory allocated, however often the call is repeated. */
static cu_result load_kernels(struct device *d) {
  if (!loaded) loaded = calloc((size_t)dsa_num_cuda_sets, sizeof *loaded);
  int *resident = calloc((size_t)dsa_num_cuda_kernels, sizeof *resident);
  if (!loaded || !resident) {
    free(resident);
    return CU_OUT_OF_MEMORY;
  }
  struct loaded *l = &loaded[d->properties.set - dsa_cuda_sets];
  cu_result error = is_in_use(l) ? 0 : load(l, d->properties.set);
  if (!error) error = ready_kernels(d, l, resident);
  if (error) {
    free(resident);
    if (!is_in_use(l)) unload(l);
    return error;
  }
  d->resident = resident;
  d->kernels = l->kernels;
  return 0;
}

/* Whether an error says that this driver can never load these kernels. Other errors may pass: a GPU that is out of
 * memory, or a context that another kernel has broken. */
static int is_lasting(cu_result error) {
  return error == CU_INVALID_IMAGE || error == CU_NO_BINARY_FOR_GPU || error == CU_INVALID_PTX ||
         error == CU_JIT_COMPILER_NOT_FOUND || error == CU_UNSUPPORTED_PTX_VERSION ||
         error == CU_JIT_COMPILATION_DISABLED || error == CU_NOT_FOUND || error == CU_NOT_SUPPORTED;
}

/* A driver runs the code of nvcc of its own major version and of earlier ones. */
static void explain(char *words, size_t size, int ordinal, cu_result error) {
  int driver = 0;
  int used = snprintf(words, size, "the kernels do not load on CUDA device %d: %s", ordinal, dsa_cuda_error(error));
  if (used < (int)size && !dsa_cu.cuDriverGetVersion(&driver) && driver / 1000 < dsa_cuda_toolkit / 1000)
    snprintf(words + used, size - (size_t)used,
             " (the driver is for CUDA %d.%d, and nvcc %d.%d made them: they need a newer driver)", driver / 1000,
             driver % 1000 / 10, dsa_cuda_toolkit / 1000, dsa_cuda_toolkit % 1000 / 10);
}

/* Prepares a device at its first call. The caller may be capturing a graph, which this must not become part of. */
static dsa_tvm_status prepare(struct device *d, int ordinal, const char *op) {
  if (d->refusal[0]) return dsa_fail(DSA_TVM_UNSUPPORTED, "%s: %s", op, d->refusal);
  cu_result error = find_properties(d, ordinal);
  const struct cuda_device *p = &d->properties;
  if (!error && !p->set) {
    snprintf(d->refusal, sizeof d->refusal,
             "this library has no kernels for a GPU of compute capability %d.%d, but for %s", p->capability / 10,
             p->capability % 10, dsa_tvm_cuda_archs());
    return dsa_fail(DSA_TVM_UNSUPPORTED, "%s: %s", op, d->refusal);
  }
  if (!error) {
    int pushed = 0, mode = CU_STREAM_CAPTURE_MODE_RELAXED;
    dsa_cu.cuThreadExchangeStreamCaptureMode(&mode);
    cu_context primary = NULL, context;
    error = dsa_cu.cuDevicePrimaryCtxRetain(&primary, d->handle);
    d->primary = error ? NULL : primary;
    if (!error) error = enter(d, &pushed);
    if (!error) error = load_kernels(d);
    if (pushed) dsa_cu.cuCtxPopCurrent_v2(&context);
    /* Release it: a context takes hundreds of megabytes. */
    if (error && d->primary) dsa_cu.cuDevicePrimaryCtxRelease_v2(d->handle);
    dsa_cu.cuThreadExchangeStreamCaptureMode(&mode);
  }
  if (!error) return DSA_TVM_OK;
  if (error == CU_OUT_OF_MEMORY)
    return dsa_fail(DSA_TVM_OUT_OF_MEMORY, "%s: no memory for the kernels on CUDA device %d: %s", op, ordinal,
                    dsa_cuda_error(error));
  char words[sizeof d->refusal];
  explain(words, sizeof words, ordinal, error);
  if (is_lasting(error)) memcpy(d->refusal, words, sizeof words);
  return dsa_fail(DSA_TVM_UNSUPPORTED, "%s: %s", op, words);
}

dsa_tvm_status dsa_cuda_find_device(struct cuda_call *call) {
  const char *op = call->call->op->name;
  int ordinal = call->call->device_id;
  int num_devices = 0;
  const char *unavailable = dsa_cuda_find_driver(&num_devices);
  if (unavailable) return dsa_fail(DSA_TVM_UNSUPPORTED, "%s: %s", op, unavailable);
  if (ordinal < 0 || ordinal >= num_devices || ordinal >= MAX_DEVICES)
    return dsa_fail(DSA_TVM_INVALID_ARGUMENT, "%s: %s: expected a CUDA device in 0..%d, got %d", op,
                    call->call->op->inputs[0].name, num_devices - 1, ordinal);
  struct device *d = &devices[ordinal];
  pthread_mutex_lock(&devices_lock);
  dsa_tvm_status status = d->kernels ? DSA_TVM_OK : prepare(d, ordinal, op);
  pthread_mutex_unlock(&devices_lock);
  if (status == DSA_TVM_OK) call->device = &d->properties;
  return status;
}

dsa_tvm_status dsa_cuda_begin(struct cuda_call *call) {
  dsa_tvm_status status = dsa_cuda_find_device(call);
  if (status != DSA_TVM_OK) return status;
  int ordinal = call->call->device_id;
  cu_result error = enter(&devices[ordinal], &call->pushed);
  if (!error) return DSA_TVM_OK;
  return dsa_fail(DSA_TVM_INTERNAL, "%s: no context of CUDA device %d: %s", call->call->op->name, ordinal,
                  dsa_cuda_error(error));
}

void dsa_cuda_end(struct cuda_call *call) {
  cu_context context;
  if (call->pushed) dsa_cu.cuCtxPopCurrent_v2(&context);
}

static int serves(const struct cuda_kernel *kernel, const struct cuda_call *call) {
  if (kernel->aligned && !call->aligned) return 0;
  for (int v = 0; v < MAX_TYPE_VARS; v++)
    if (kernel->types[v] >= 0 && kernel->types[v] != call->call->type[v]) return 0;
  for (int i = 0; i < MAX_SIZES; i++) {
    if (kernel->sizes[i].dim < 0) continue;
    int64_t length = call->call->dim[kernel->sizes[i].dim];
    if (length > kernel->sizes[i].length || (!kernel->sizes[i].at_most && length < kernel->sizes[i].length)) return 0;
  }
  return 1;
}

const struct cuda_shape *dsa_cuda_shape(const struct cuda_call *call, int first, int count) {
  const struct cuda_shape *shapes = call->device->set->shapes;
  for (int k = first; k < first + count; k++)
    if (shapes[k].threads && serves(&dsa_cuda_kernels[k], call)) return &shapes[k];
  return NULL;
}

int dsa_cuda_resident(const struct cuda_call *call, const struct cuda_shape *shape, int64_t shared_bytes) {
  const struct cuda_device *p = call->device;
  int system = dsa_cuda_system_shared, by_registers = devices[call->call->device_id].resident[shape - p->set->shapes];
  int by_memory = (int)((p->shared_bytes + system) / (shared_bytes + system));
  return by_registers < by_memory ? by_registers : by_memory;
}

dsa_tvm_status dsa_cuda_unserved(const struct cuda_call *call) {
  return dsa_fail(DSA_TVM_UNSUPPORTED, "%s: this library has no CUDA kernel for these element types and lengths",
                  call->call->op->name);
}

dsa_tvm_status dsa_cuda_launch(const struct cuda_call *call, const struct cuda_shape *shape, int64_t grid_x,
                               int64_t grid_y, int64_t dynamic_bytes, void **args) {
  if (!shape) return dsa_cuda_unserved(call);
  if (!grid_x || !grid_y) return DSA_TVM_OK;
  int k = (int)(shape - call->device->set->shapes);
  const char *op = call->call->op->name, *name = dsa_cuda_kernels[k].name;
  if (dynamic_bytes == MOST_SHARED) dynamic_bytes = shape->shared_bytes;
  if (grid_x > INT32_MAX || grid_y > UINT16_MAX || dynamic_bytes > call->device->shared_bytes)
    return dsa_fail(DSA_TVM_INTERNAL, "%s: %s: no launch of %lld x %lld blocks with %lld of %d bytes of shared memory",
                    op, name, (long long)grid_x, (long long)grid_y, (long long)dynamic_bytes,
                    call->device->shared_bytes);
  /* The driver accepts the handle of a kernel for a function, and finds the function in the current context. */
  cu_result error = dsa_cu.cuLaunchKernel((cu_function)devices[call->call->device_id].kernels[k], (unsigned)grid_x,
                                      (unsigned)grid_y, 1, (unsigned)shape->threads, 1, 1, (unsigned)dynamic_bytes,
                                      (cu_stream)call->stream, args, NULL);
  if (!error) return DSA_TVM_OK;
  return dsa_fail(error == CU_OUT_OF_MEMORY ? DSA_TVM_OUT_OF_MEMORY : DSA_TVM_INTERNAL, "%s: %s: %s", op, name,
                  dsa_cuda_error(error));
}

static int same_boxes(const struct cuda_boxes *a, const struct cuda_boxes *b) {
  int same = a->data == b->data && a->element_bytes == b->element_bytes && a->rank == b->rank;
  for (int i = 0; i < a->rank && same; i++) same = a->lengths[i] == b->lengths[i] && a->box[i] == b->box[i];
  return same;
}

dsa_tvm_status dsa_cuda_tensor_map(const struct cuda_call *call, const struct cuda_boxes *boxes,
                                   struct cuda_encoded *known) {
  static const unsigned one[3] = {1, 1, 1};
  int width = boxes->element_bytes, rank = boxes->rank, row = boxes->box[0] * width;
  if (same_boxes(boxes, &known->boxes)) return DSA_TVM_OK;
  uint64_t lengths[3], strides[3];
  unsigned box[3];
  for (int i = 0; i < rank; i++) {
    lengths[i] = (uint64_t)boxes->lengths[i];
    strides[i] = lengths[i] * (i ? strides[i - 1] : (uint64_t)width);
    box[i] = (unsigned)boxes->box[i];
  }
  cu_result error = dsa_cu.cuTensorMapEncodeTiled(
      &known->map, width == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, (unsigned)rank,
      (void *)boxes->data, lengths, strides, box, one, 0,
      row == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
      : row == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                  : CU_TENSOR_MAP_SWIZZLE_32B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, 0);
  known->boxes = error ? (struct cuda_boxes){0} : *boxes;
  if (!error) return DSA_TVM_OK;
  return dsa_fail(DSA_TVM_INTERNAL, "%s: no tensor map: %s", call->call->op->name, dsa_cuda_error(error));
}
