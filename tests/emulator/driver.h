/* The kernels behind the CUDA driver's ABI: named libcuda.so.1 and found first, the library's CUDA side runs on the CPU,
   its launches included. Device memory is the process's own, a stream runs at once. */
#pragma once

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <map>
#include <mutex>
#include <string>

#include "tensor_map.h"

static std::string emulated_failure;
/* As on a GPU, a kernel's failure is that of everything behind it. */
static int emulated_status() { return emulated_failure.empty() ? 0 : 719; }

extern "C" {

int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorString(int error, const char **text) {
  *text = error == 719 ? emulated_failure.c_str() : "no such thing in the emulator";
  return 0;
}
int cuDeviceGetCount(int *count) { return *count = 1, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal != 0; }
int cuDeviceGetAttribute(int *value, int attribute, int) {
  const char *text = getenv("CUDA_EMULATOR_CAPABILITY");
  int capability = text ? atoi(text) : 86, shared_bytes = (capability == 90 ? 227 : 99) << 10;
  *value = attribute == 16   ? 4
           : attribute == 75 ? capability / 10
           : attribute == 76 ? capability % 10
           : attribute == 97 ? shared_bytes
           : attribute == 115 ? 1
                             : 0;
  /* 1 GHz, memory of 1 GHz and 64 bits, a cache of 1 MiB. */
  if (attribute == 13 || attribute == 36) *value = 1000000;
  if (attribute == 37) *value = 64;
  if (attribute == 38) *value = 1 << 20;
  return 0;
}
int cuDeviceGetName(char *name, int size, int) {
  strncpy(name, "CUDA emulator", (size_t)size);
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuMemAlloc_v2(unsigned long long *address, size_t bytes) {
  *address = (unsigned long long)aligned_alloc(256, (bytes + 255) / 256 * 256);
  return *address ? 0 : 2;
}
int cuMemFree_v2(unsigned long long address) { return free((void *)address), 0; }
int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t bytes) {
  memcpy((void *)to, from, bytes);
  return emulated_status();
}
int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t bytes) {
  memcpy(to, (const void *)from, bytes);
  return emulated_status();
}
int cuMemsetD8Async(unsigned long long to, unsigned char byte, size_t bytes, void *) {
  memset((void *)to, byte, bytes);
  return emulated_status();
}
/* What was taken of memory pools, and on which stream last. CUDA_EMULATOR_POOL_BYTES is the most that one has. */
struct {
  size_t taken, given_back, bytes;
  void *stream;
} emulated_pool;
int cuMemPoolCreate(void **pool, const void *) { return *pool = malloc(1), 0; }
int cuMemPoolDestroy(void *pool) { return free(pool), 0; }
int cuMemPoolSetAttribute(void *, int attribute, void *) { return attribute == 4 ? 0 : 1; }
int cuMemAllocFromPoolAsync(unsigned long long *address, size_t bytes, void *, void *stream) {
  const char *most = getenv("CUDA_EMULATOR_POOL_BYTES");
  if (most && bytes > (size_t)atoll(most)) return 2;
  if (int error = cuMemAlloc_v2(address, bytes)) return error;
  memset((void *)*address, 0xFF, bytes);
  emulated_pool.taken++;
  emulated_pool.bytes = bytes;
  emulated_pool.stream = stream;
  return 0;
}
int cuMemFreeAsync(unsigned long long address, void *stream) {
  emulated_pool.given_back += stream == emulated_pool.stream;
  return cuMemFree_v2(address);
}
int cuStreamCreate(void **stream, unsigned) { return *stream = malloc(1), 0; }
int cuStreamDestroy_v2(void *stream) { return free(stream), 0; }
int cuStreamSynchronize(void *) { return emulated_status(); }
int cuEventCreate(void **event, unsigned) { return *event = malloc(sizeof(timespec)), 0; }
int cuEventDestroy_v2(void *event) { return free(event), 0; }
int cuEventRecord(void *event, void *) { return clock_gettime(CLOCK_MONOTONIC, (timespec *)event), emulated_status(); }
int cuEventElapsedTime(float *milliseconds, void *from, void *to) {
  const timespec *a = (timespec *)from, *b = (timespec *)to;
  *milliseconds = (float)(1e3 * (double)(b->tv_sec - a->tv_sec) + 1e-6 * (double)(b->tv_nsec - a->tv_nsec));
  return emulated_status();
}
int cuDevicePrimaryCtxRetain(void **context, int) { return *context = &emulated_failure, 0; }
static thread_local void *current_context;
int cuCtxGetCurrent(void **context) { return *context = current_context, 0; }
int cuCtxGetDevice(int *device) { return *device = 0, current_context ? 0 : 201; }
int cuCtxPushCurrent_v2(void *context) { return current_context = context, 0; }
int cuCtxPopCurrent_v2(void **context) { return *context = current_context, current_context = nullptr, 0; }
int cuThreadExchangeStreamCaptureMode(int *) { return 0; }
int cuLibraryLoadData(void **library, const void *image, int *, void **, unsigned, int *, void **, unsigned) {
  static const char elsewhere[] = "emulator:";
  Dl_info self;
  dladdr((void *)cuInit, &self);
  const char *named = strncmp((const char *)image, elsewhere, sizeof elsewhere - 1) ? self.dli_fname
                                                                                   : (const char *)image + 9;
  *library = dlopen(named, RTLD_NOW);
  return *library ? 0 : 999;
}
int cuLibraryUnload(void *library) { return dlclose(library); }
int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  /* A test that needs a few kernels compiles no others. */
  *kernel = dlsym(library, (std::string("thunk_") + name).c_str());
  if (!*kernel) *kernel = (void *)cuInit;
  return 0;
}
int cuKernelGetFunction(void **function, void *kernel) { return *function = kernel, 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *, int threads, size_t) {
  return *blocks = 1536 / threads, 0;
}
int cuTensorMapEncodeTiled(CUtensorMap *map, int type, unsigned rank, void *base, const uint64_t *lengths,
                           const uint64_t *strides, const unsigned *box, const unsigned *element_strides, int interleave,
                           int swizzle, int, int oob_fill) {
  return encode_tensor_map(map, type, rank, base, lengths, strides, box, element_strides, interleave, swizzle, oob_fill);
}
/* Without it a block has 48 KiB at most. */
static std::map<void *, unsigned> shared_limits;
int cuKernelSetAttribute(int attribute, int value, void *kernel, int) {
  if (attribute == 8) shared_limits[kernel] = (unsigned)value;
  return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared_bytes, void *, void **args, void **) {
  unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
  if (!current_context) return 201;
  if (function == (void *)cuInit) return 500;
  if (shared_bytes > (48 << 10) && shared_bytes > shared_limits[function]) return 1;
  const char *order = getenv("CUDA_EMULATOR_ORDER");
  unsigned seed = order ? (unsigned)atoi(order) : 0;
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> lock(one_at_a_time);
  /* The kernel's own library emulates it. */
  Dl_info home;
  dladdr(function, &home);
  auto launch = (decltype(&emulator_launch))dlsym(dlopen(home.dli_fname, RTLD_NOW), "emulator_launch");
  const char *message = launch((void (*)(void **))function, args, grid, block, shared_bytes, seed, seed % 2, 0);
  if (message) emulated_failure = message;
  return message ? 719 : 0;
}
}
