/* How many CPUs this process may use. */
#ifndef DSA_TVM_CPUS_H_
#define DSA_TVM_CPUS_H_

#include <stdint.h>

/* At least 1: the CPUs of the affinity mask, or of the CPU quota where that is less. Reads files each time. */
int dsa_usable_cpus(void);

/* CPUs that the quotas of this process's cgroups (version 1 or 2) leave, rounded up; INT32_MAX: no limit. Absolute
 * paths are looked up below `root`: "" for the machine's own. */
int dsa_cpu_quota(const char *root);

#endif
