/* The compiled kernels: which set this CPU runs, and the few services their code asks of its host. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Declares every kernel and defines kernel_sets[], best first: generated. */
#include "kernels.h"

enum { TVM_INT = 1, TVM_FLOAT = 3, TVM_TENSOR = 7 };

static _Thread_local char kernel_message[512];
static _Thread_local int out_of_memory;

/* The one function TVM's generated code links to: it reports a failed check of its own. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts) {
  size_t used = (size_t)snprintf(kernel_message, sizeof kernel_message, "%s: ", kind);
  for (int32_t i = 0; i < num_parts && used < sizeof kernel_message; i++)
    if (parts[i]) used += (size_t)snprintf(kernel_message + used, sizeof kernel_message - used, "%s", parts[i]);
}

static void *allocate(int device_type, int device_id, uint64_t bytes, int type_code, int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  /* 64: what the generated code assumes of a workspace. A size near 2**64 must not wrap to a small one. */
  void *p = bytes < UINT64_MAX / 2 ? aligned_alloc(64, (size_t)((bytes + 63) / 64 * 64)) : NULL;
  if (!p) out_of_memory = 1;
  return p;
}

static int release(int device_type, int device_id, void *p) {
  (void)device_type, (void)device_id;
  free(p);
  return 0;
}

/* Pointers the generated code calls through; the objects define those that they use. */
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void *) __attribute__((weak));

static int cpu_runs(const char *target) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  int v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") && __builtin_cpu_supports("popcnt");
  int v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2");
  int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  if (!strcmp(target, "x86-64-v2")) return v2;
  if (!strcmp(target, "x86-64-v3")) return v3;
  return !strcmp(target, "x86-64-v4") && v4;
#elif defined(__aarch64__)
  return !strcmp(target, "aarch64");
#else
  (void)target;
  return 0;
#endif
}

static const struct kernel_set *chosen;
static char refusal[256];

static void choose(void) {
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;
  const char *wanted = getenv("DSA_TVM_TARGET");
  char built[128] = "";
  for (size_t i = 0; i < sizeof kernel_sets / sizeof kernel_sets[0]; i++) {
    const struct kernel_set *set = &kernel_sets[i];
    size_t used = strlen(built);
    snprintf(built + used, sizeof built - used, used ? ", %s" : "%s", set->target);
    if (chosen || (wanted && *wanted && strcmp(wanted, set->target))) continue;
    if (cpu_runs(set->target))
      chosen = set;
    else if (wanted && *wanted)
      snprintf(refusal, sizeof refusal, "DSA_TVM_TARGET: expected a target this CPU runs, got %s", wanted);
  }
  if (chosen || refusal[0]) return;
  if (wanted && *wanted)
    snprintf(refusal, sizeof refusal, "DSA_TVM_TARGET: expected one of %s, got %.64s", built, wanted);
  else
    snprintf(refusal, sizeof refusal, "this CPU runs none of the library's targets (%s)", built);
}

const struct kernel_set *dsa_kernels(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, choose);
  if (!chosen) dsa_fail(DSA_TVM_UNSUPPORTED, "%s", refusal);
  return chosen;
}

struct tvm_any dsa_arg_tensor(dsa_tvm_tensor *tensor) {
  struct tvm_any any = {TVM_TENSOR, 0, {.p = tensor}};
  return any;
}

struct tvm_any dsa_arg_int(int64_t value) {
  struct tvm_any any = {TVM_INT, 0, {.i = value}};
  return any;
}

struct tvm_any dsa_arg_float(double value) {
  struct tvm_any any = {TVM_FLOAT, 0, {.f = value}};
  return any;
}

void dsa_call_kernel(struct dsa_outcome *outcome, dsa_kernel kernel, const struct tvm_any *args, int num_args) {
  struct tvm_any result = {0, 0, {0}};
  kernel_message[0] = '\0';
  out_of_memory = 0;
  if (kernel(NULL, args, num_args, &result) == 0) return;
  /* Several tasks may fail at once; the first one's message is kept. */
#pragma omp critical(dsa_outcome)
  if (!outcome->failed) {
    outcome->failed = 1;
    outcome->status = out_of_memory ? DSA_TVM_OUT_OF_MEMORY : DSA_TVM_INTERNAL;
    snprintf(outcome->message, sizeof outcome->message, "%s",
             out_of_memory ? "no memory for the workspace of a task" : kernel_message);
  }
}
