/* Declares the part of the CUDA driver's C interface that is used here, so that a build needs no CUDA header. */
#ifndef DSA_TVM_CUDA_ABI_H_
#define DSA_TVM_CUDA_ABI_H_

#include <stddef.h>
#include <stdint.h>

typedef int cu_result; /* 0: success */
typedef int cu_device;
typedef struct CUctx_st *cu_context;
typedef struct CUlib_st *cu_library;
typedef struct CUkern_st *cu_kernel;
typedef struct CUfunc_st *cu_function;
typedef struct CUstream_st *cu_stream;
typedef struct CUmemPoolHandle_st *cu_memory_pool;

/* CUtensorMap, which bulk copies read. */
struct cuda_tensor_map {
  _Alignas(64) uint64_t opaque[16];
};

/* CUmemPoolProps. */
struct cuda_pool_properties {
  int allocation, handles;
  int location, ordinal;
  void *security;
  size_t most_bytes; /* 0: no limit */
  uint8_t reserved[56];
};

enum {
  CU_OUT_OF_MEMORY = 2,
  CU_STUB_LIBRARY = 34,
  CU_NO_DEVICE = 100,
  CU_INVALID_IMAGE = 200,
  CU_NO_BINARY_FOR_GPU = 209,
  CU_INVALID_PTX = 218,
  CU_JIT_COMPILER_NOT_FOUND = 221,
  CU_UNSUPPORTED_PTX_VERSION = 222,
  CU_JIT_COMPILATION_DISABLED = 223,
  CU_NOT_FOUND = 500,
  CU_NOT_SUPPORTED = 801,
  CU_SYSTEM_DRIVER_MISMATCH = 803,
  CU_COMPAT_NOT_SUPPORTED = 804,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
  CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115,
  CU_MEM_ALLOCATION_TYPE_PINNED = 1,
  CU_MEM_LOCATION_TYPE_DEVICE = 1,
  CU_MEMPOOL_ATTR_RELEASE_THRESHOLD = 4,
  CU_STREAM_CAPTURE_MODE_RELAXED = 2,
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 0,
  CU_TENSOR_MAP_DATA_TYPE_UINT16 = 1,
  CU_TENSOR_MAP_SWIZZLE_32B = 1,
  CU_TENSOR_MAP_SWIZZLE_64B = 2,
  CU_TENSOR_MAP_SWIZZLE_128B = 3,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3,
};

/* Every entry point with its parameters. The plain name of those with _v2 is an older interface. */
#define DSA_CUDA_DRIVER(X)                                                                                          \
  X(cuInit, (unsigned flags))                                                                                       \
  X(cuDriverGetVersion, (int *version))                                                                             \
  X(cuGetErrorString, (cu_result error, const char **text))                                                         \
  X(cuDeviceGetCount, (int *count))                                                                                 \
  X(cuDeviceGet, (cu_device * device, int ordinal))                                                                 \
  X(cuDeviceGetAttribute, (int *value, int attribute, cu_device device))                                            \
  X(cuDevicePrimaryCtxRetain, (cu_context * context, cu_device device))                                             \
  X(cuDevicePrimaryCtxRelease_v2, (cu_device device))                                                               \
  X(cuCtxGetCurrent, (cu_context * context))                                                                        \
  X(cuCtxGetDevice, (cu_device * device))                                                                           \
  X(cuCtxPushCurrent_v2, (cu_context context))                                                                      \
  X(cuCtxPopCurrent_v2, (cu_context * context))                                                                     \
  X(cuThreadExchangeStreamCaptureMode, (int *mode))                                                                 \
  X(cuLibraryLoadData, (cu_library * library, const void *code, int *jit_options, void **jit_values, unsigned jits, \
                        int *options, void **values, unsigned num_options))                                         \
  X(cuLibraryUnload, (cu_library library))                                                                          \
  X(cuLibraryGetKernel, (cu_kernel * kernel, cu_library library, const char *name))                                 \
  X(cuKernelGetFunction, (cu_function * function, cu_kernel kernel))                                                \
  X(cuKernelSetAttribute, (int attribute, int value, cu_kernel kernel, cu_device device))                           \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor,                                                                    \
    (int *blocks, cu_function function, int threads, size_t shared_bytes))                                          \
  X(cuMemPoolCreate, (cu_memory_pool * pool, const struct cuda_pool_properties *properties))                        \
  X(cuMemPoolDestroy, (cu_memory_pool pool))                                                                        \
  X(cuMemPoolSetAttribute, (cu_memory_pool pool, int attribute, void *value))                                       \
  X(cuMemAllocFromPoolAsync, (uint64_t *address, size_t bytes, cu_memory_pool pool, cu_stream stream))              \
  X(cuMemFreeAsync, (uint64_t address, cu_stream stream))                                                           \
  X(cuTensorMapEncodeTiled, (struct cuda_tensor_map * map, int type, unsigned rank, void *base,                     \
                             const uint64_t *lengths, const uint64_t *strides, const unsigned *box,                 \
                             const unsigned *element_strides, int interleave, int swizzle, int l2_promotion,        \
                             int out_of_bounds))                                                                    \
  X(cuLaunchKernel, (cu_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,     \
                     unsigned block_y, unsigned block_z, unsigned shared_bytes, cu_stream stream, void **args,      \
                     void **extra))

#endif
