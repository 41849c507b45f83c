/* The level of a CPU of which CPUID and XGETBV say what the arguments are. */
#include <stdio.h>
#include <stdlib.h>

#include "common/x86_level.h"

int main(int argc, char **argv) {
  for (int i = 1; i + 3 < argc; i += 4) {
    struct x86_features f = {(uint32_t)strtoul(argv[i], NULL, 0), (uint32_t)strtoul(argv[i + 1], NULL, 0),
                             (uint32_t)strtoul(argv[i + 2], NULL, 0), (uint32_t)strtoul(argv[i + 3], NULL, 0), 0};
    printf("%d\n", x86_level(&f));
  }
  return 0;
}
