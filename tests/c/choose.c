/* The target that a library takes on CPUs of which CPUID and XGETBV say what the arguments are, and what it takes if
 * DSA_TVM_TARGET is set. */
#include <stdio.h>
#include <stdlib.h>

#include "common/x86_level.h"

static struct x86_features masked;
static struct x86_features features_given(void) { return masked; }
#define x86_features_here features_given
#include "common/choose.c"

int main(int argc, char **argv) {
  for (int i = 1; i + 5 < argc; i += 6) {
    uint32_t word[6];
    for (int j = 0; j < 6; j++) word[j] = (uint32_t)strtoul(argv[i + j], NULL, 0);
    masked = (struct x86_features){word[0], word[1], word[2], word[3], word[4], word[5]};
    chosen = NULL;
    refusal[0] = 0;
    choose();
    printf("%s\n", chosen ? chosen->target : refusal);
  }
  return 0;
}
