#include "cuda/driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

struct cuda_driver dsa_cu;

static char unavailable[512];
static int found_devices;
/* Whether this is final. A GPU that is out of memory, or a system that is still starting, may be ready later. */
static int settled;
static atomic_int found_in; /* the process that started the driver */
static pthread_mutex_t finding = PTHREAD_MUTEX_INITIALIZER;

const char *dsa_cuda_error(cu_result error) {
  const char *text = NULL;
  return dsa_cu.cuGetErrorString(error, &text) || !text ? "unknown error" : text;
}

static int is_lasting(cu_result error) {
  return error == CU_STUB_LIBRARY || error == CU_NO_DEVICE || error == CU_SYSTEM_DRIVER_MISMATCH ||
         error == CU_COMPAT_NOT_SUPPORTED;
}

static void find_driver(void) {
  static void *driver;
  unavailable[0] = 0;
  settled = 1;
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
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
  found_in = getpid();
  cu_result error = dsa_cu.cuInit(0);
  if (!error) error = dsa_cu.cuDeviceGetCount(&found_devices);
  settled = !error || is_lasting(error);
  if (error)
    snprintf(unavailable, sizeof unavailable, "the CUDA driver does not start: %s", dsa_cuda_error(error));
  else if (!found_devices)
    snprintf(unavailable, sizeof unavailable, "the CUDA driver finds no GPU");
}

const char *dsa_cuda_find_driver(int *num_devices) {
  static _Thread_local char words[sizeof unavailable];
  /* After a fork the driver only says that it is not initialized. Take no lock: its holder may be missing here. */
  if (found_in && found_in != getpid())
    return unavailable[0] ? unavailable
                          : "the CUDA driver was first used before this process was forked and does not work here; "
                            "start processes with spawn";
  pthread_mutex_lock(&finding);
  if (!settled) find_driver();
  *num_devices = found_devices;
  memcpy(words, unavailable, sizeof words);
  pthread_mutex_unlock(&finding);
  return words[0] ? words : NULL;
}
