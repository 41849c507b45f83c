/* Chooses the kernel set for this CPU. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/internal.h"

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
    if (dsa_cpu_runs(set))
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
