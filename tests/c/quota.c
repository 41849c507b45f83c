/* The CPUs that a tree of files gives this process. */
#include <stdio.h>

#include "cpu/cpus.h"

int main(int argc, char **argv) { return argc == 2 ? printf("%d\n", dsa_cpu_quota(argv[1])) < 0 : 2; }
