/* A CUDA driver that computes nothing and writes down what it is asked for. The environment says what it finds:
 * FAKE_VERSION, FAKE_GPUS, FAKE_CAPABILITY, FAKE_MULTIPROCESSORS, FAKE_RESIDENT (blocks that registers allow on one),
 * FAKE_CONTEXT (the context that is current, if any: n is the primary one of device n, 8 + n another one of it) and
 * FAKE_FAILURE: the function that fails, with FAKE_ERROR, in its calls FAKE_FAILS, such as 2-3 (by default in all).
 * Built with -DTOO_OLD it lacks what CUDA 12.0 brought. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int number(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}

static int outcome(const char *function) {
  static int calls;
  const char *failure = getenv("FAKE_FAILURE"), *which = getenv("FAKE_FAILS");
  int first = 1, last = 1 << 30;
  if (!failure || strcmp(failure, function)) return 0;
  if (which) sscanf(which, "%d-%d", &first, &last);
  calls++;
  return first <= calls && calls <= last ? number("FAKE_ERROR", 999) : 0;
}

#define OUTCOME outcome(__func__)

enum { DEVICES = 8 };
static int contexts[2 * DEVICES], *current;

int cuInit(unsigned flags) {
  int own = number("FAKE_CONTEXT", -1);
  (void)flags;
  if (own >= 0) current = &contexts[own];
  return OUTCOME;
}

int cuDriverGetVersion(int *version) {
  *version = number("FAKE_VERSION", 13000);
  return OUTCOME;
}

int cuGetErrorString(int error, const char **text) {
  *text = error == number("FAKE_ERROR", 999) ? "the failure that was asked for" : NULL;
  return *text == NULL;
}

int cuDeviceGetCount(int *count) {
  *count = number("FAKE_GPUS", 1);
  return OUTCOME;
}

int cuDeviceGet(int *device, int ordinal) {
  *device = ordinal;
  return OUTCOME;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int capability = number("FAKE_CAPABILITY", 90);
  (void)device;
  *value = attribute == 16 ? number("FAKE_MULTIPROCESSORS", 132) : attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10
           : attribute == 115 ? number("FAKE_POOLS", 1)
                              : (capability == 90 || capability == 100 ? 227 : 99) << 10;
  return OUTCOME;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
  *context = &contexts[device];
  return OUTCOME;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
  fprintf(stderr, "release %d\n", device);
  return OUTCOME;
}

int cuCtxGetCurrent(void **context) {
  *context = current;
  return OUTCOME;
}

int cuCtxGetDevice(int *device) {
  if (!current) return 201; /* CUDA_ERROR_INVALID_CONTEXT */
  *device = (int)(current - contexts) % DEVICES;
  return OUTCOME;
}

static int *below;

int cuCtxPushCurrent_v2(void *context) {
  below = current;
  current = context;
  fprintf(stderr, "push %d\n", (int)(current - contexts));
  return OUTCOME;
}

int cuCtxPopCurrent_v2(void **context) {
  *context = current;
  fprintf(stderr, "pop %d\n", (int)(current - contexts));
  current = below;
  return OUTCOME;
}

int cuThreadExchangeStreamCaptureMode(int *mode) {
  static int now;
  int before = now;
  now = *mode;
  *mode = before;
  fprintf(stderr, "capture mode %d\n", now);
  return OUTCOME;
}

#ifndef TOO_OLD
int cuLibraryLoadData(void **library, const void *code, int *a, void **b, unsigned c, int *d, void **e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  *library = (void *)(size_t)code;
  int error = OUTCOME;
  if (!error) fprintf(stderr, "image\n");
  return error;
}

int cuLibraryUnload(void *library) {
  (void)library;
  fprintf(stderr, "unload\n");
  return OUTCOME;
}

int cuLibraryGetKernel(void **kernel, void *library, const char *name) {
  (void)library;
  *kernel = strdup(name);
  return OUTCOME;
}
#endif

int cuKernelGetFunction(void **function, void *kernel) {
  *function = kernel;
  return OUTCOME;
}

int cuKernelSetAttribute(int attribute, int value, void *kernel, int device) {
  (void)attribute, (void)kernel, (void)device;
  fprintf(stderr, "at most %d\n", value);
  return OUTCOME;
}

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared_bytes) {
  (void)function, (void)shared_bytes;
  int by_threads = 2048 / threads;
  *blocks = number("FAKE_RESIDENT", by_threads);
  return OUTCOME;
}

int cuMemPoolCreate(void **pool, const void *properties) {
  (void)properties;
  *pool = (void *)1;
  fprintf(stderr, "pool\n");
  return OUTCOME;
}

int cuMemPoolDestroy(void *pool) {
  (void)pool;
  fprintf(stderr, "no pool\n");
  return OUTCOME;
}

int cuMemPoolSetAttribute(void *pool, int attribute, void *value) {
  (void)pool, (void)attribute, (void)value;
  return OUTCOME;
}

int cuMemAllocFromPoolAsync(unsigned long long *address, size_t bytes, void *pool, void *stream) {
  (void)pool;
  *address = 4096;
  fprintf(stderr, "take %zu stream %zu\n", bytes, (size_t)stream);
  return OUTCOME;
}

int cuMemFreeAsync(unsigned long long address, void *stream) {
  (void)address;
  fprintf(stderr, "give back stream %zu\n", (size_t)stream);
  return OUTCOME;
}

int cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *base, const void *lengths, const void *strides,
                           const unsigned *box, const unsigned *steps, int interleave, int swizzle, int l2, int fill) {
  (void)map, (void)type, (void)base, (void)lengths, (void)strides, (void)steps, (void)interleave, (void)l2, (void)fill;
  fprintf(stderr, "tensor map of rank %u, boxes of %u x %u, swizzle %d\n", rank, box[0], box[1], swizzle);
  return OUTCOME;
}

int cuLaunchKernel(void *kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by, unsigned bz,
                   unsigned shared_bytes, void *stream, void **args, void **extra) {
  (void)by, (void)bz, (void)args, (void)extra;
  fprintf(stderr, "launch %s grid %u %u %u block %u shared %u stream %zu context %d\n", (const char *)kernel, x, y, z,
          threads, shared_bytes, (size_t)stream, current ? (int)(current - contexts) : -1);
  return OUTCOME;
}
