#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

struct cuda_driver dsa_cu;

static char unavailable[512];
static int found_devices;

const char *dsa_cuda_error(cu_result error) {
  const char *text = NULL;
  return dsa_cu.cuGetErrorString(error, &text) || !text ? "unknown error" : text;
}

static void find_driver(void) {
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!driver) {
    snprintf(unavailable, sizeof unavailable, "no CUDA driver could be loaded (%s); it comes with NVIDIA's GPU driver",
             dlerror());
    return;
  }
#define RESOLVE(name, parameters)                                                                              \
  if (!(dsa_cu.name = (cu_result(*) parameters)dlsym(driver, #name))) {                                        \
    snprintf(unavailable, sizeof unavailable, "the CUDA driver is too old: it has no " #name ", 12.0 has it"); \
    return;                                                                                                    \
  }
  DSA_CUDA_DRIVER(RESOLVE)
#undef RESOLVE
  cu_result error = dsa_cu.cuInit(0);
  if (!error) error = dsa_cu.cuDeviceGetCount(&found_devices);
  if (error)
    snprintf(unavailable, sizeof unavailable, "the CUDA driver does not start: %s", dsa_cuda_error(error));
  else if (!found_devices)
    snprintf(unavailable, sizeof unavailable, "the CUDA driver finds no GPU");
}

const char *dsa_cuda_find_driver(int *num_devices) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, find_driver);
  *num_devices = found_devices;
  return unavailable[0] ? unavailable : NULL;
}
