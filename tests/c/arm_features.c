/* The features of an Arm CPU of which Linux says what the arguments are. */
#include <stdio.h>
#include <stdlib.h>

#include "common/arm_features.h"

int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) printf("%d\n", arm_dots(strtoul(argv[i], NULL, 0)) == ARM_DOTPROD);
  return 0;
}
