/* The features of an Arm CPU of which Linux says what the pairs of arguments are: AT_HWCAP and AT_HWCAP2. */
#include <stdio.h>
#include <stdlib.h>

#include "common/arm_features.h"

int main(int argc, char **argv) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const unsigned has = arm_dots(strtoul(argv[i], NULL, 0), strtoul(argv[i + 1], NULL, 0));
    printf("%s%s%s.\n", has & ARM_DOTPROD ? "dotprod " : "", has & ARM_I8MM ? "i8mm " : "", has & ARM_BF16 ? "bf16 " : "");
  }
  return 0;
}
