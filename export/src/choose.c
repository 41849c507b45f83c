/* Which of the library's kernel sets this CPU runs. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

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
  if (!strcmp(target, "x86-64-v4")) return v4;
  return !strcmp(target, "x86-64-v4-bf16") && v4 && __builtin_cpu_supports("avx512bf16");
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
  const char *wanted = getenv("DSA_TVM_TARGET");
  char built[128] = "";
  for (int i = 0; i < dsa_num_kernel_sets; i++) {
    const struct kernel_set *set = &dsa_kernel_sets[i];
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
