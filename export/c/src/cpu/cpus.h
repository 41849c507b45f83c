/* How many CPUs this process may use. */
#ifndef DSA_TVM_CPUS_H_
#define DSA_TVM_CPUS_H_

#include <stdint.h>

/* The CPUs of the affinity mask, or of the CPU quota if that is less; at least 1. Each call reads files. */
int dsa_usable_cpus(void);

/* CPUs that the quotas of this process's cgroups (version 1 or 2) allow, rounded up; INT32_MAX: no limit. Absolute
 * paths are looked up below `root`, which is "" except in tests. */
int dsa_cpu_quota(const char *root);

#endif
