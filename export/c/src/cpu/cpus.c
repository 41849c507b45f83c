/* Counts the CPUs that this process may use, by its affinity mask and the CPU quota of its cgroups. */
#define _GNU_SOURCE
#include "cpu/cpus.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* CPUs in the affinity mask of a thread; 0 if it cannot be read. */
static int cpus_of(pid_t thread) {
  /* The kernel refuses a mask that is too small for the machine, and a cpu_set_t has room for 1024 CPUs only. */
  for (size_t cpus = CPU_SETSIZE; cpus <= 1 << 20; cpus *= 2) {
    cpu_set_t *mask = CPU_ALLOC(cpus);
    size_t bytes = CPU_ALLOC_SIZE(cpus);
    int count = 0;
    if (mask && !sched_getaffinity(thread, bytes, mask)) count = CPU_COUNT_S(bytes, mask);
    CPU_FREE(mask);
    if (count || !mask) return count;
  }
  return 0;
}

/* Whether a comma-separated list contains a word. */
static int has_word(const char *list, const char *word) {
  size_t length = strlen(word);
  for (const char *at = list; *at; at += strcspn(at, ","), at += *at == ',')
    if (strcspn(at, ",") == length && !strncmp(at, word, length)) return 1;
  return 0;
}

/* Reads up to `most` numbers from a small file, up to the word "max". Returns how many. */
static int read_numbers(const char *path, int64_t *numbers, int most) {
  char text[64] = "";
  FILE *file = fopen(path, "re");
  if (!file) return 0;
  size_t length = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[length] = '\0';
  int count = 0;
  for (char *at = text, *end; count < most; at = end, count++) {
    long long value = strtoll(at, &end, 10);
    if (end == at) break;
    numbers[count] = value;
  }
  return count;
}

enum { PATH_BYTES = 4096 };

/* CPUs that the quota of one cgroup allows, rounded up; INT32_MAX: no limit. */
static int quota_in(const char *directory, int version) {
  char path[PATH_BYTES + 32];
  int64_t numbers[2] = {0, 0};
  if (version == 2) {
    snprintf(path, sizeof path, "%s/cpu.max", directory);
    if (read_numbers(path, numbers, 2) != 2) return INT32_MAX;
  } else {
    snprintf(path, sizeof path, "%s/cpu.cfs_quota_us", directory);
    if (!read_numbers(path, &numbers[0], 1)) return INT32_MAX;
    snprintf(path, sizeof path, "%s/cpu.cfs_period_us", directory);
    if (!read_numbers(path, &numbers[1], 1)) return INT32_MAX;
  }
  if (numbers[0] <= 0 || numbers[1] <= 0) return INT32_MAX; /* -1 in version 1: no limit */
  int64_t cpus = (numbers[0] - 1) / numbers[1] + 1;
  return cpus < INT32_MAX ? (int)cpus : INT32_MAX;
}

/* The smallest quota of a cgroup and its parents, up to the mount point of the hierarchy. */
static int quota_above(const char *root, const char *mount, const char *group, int version) {
  char directory[PATH_BYTES];
  int least = INT32_MAX;
  size_t top = strlen(root) + strlen(mount);
  if ((size_t)snprintf(directory, sizeof directory, "%s%s%s", root, mount, group) >= sizeof directory) return least;
  for (;;) {
    int quota = quota_in(directory, version);
    if (quota < least) least = quota;
    char *slash = strrchr(directory, '/');
    if (!slash || (size_t)(slash - directory) < top) return least;
    *slash = '\0';
  }
}

/* Finds the cgroup of this process in the hierarchy with the CPU controller. Returns 0 if there is none. */
static int find_group(const char *root, int version, char group[PATH_BYTES]) {
  char path[PATH_BYTES], line[PATH_BYTES];
  snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
  FILE *file = fopen(path, "re");
  int found = 0;
  while (file && !found && fgets(line, sizeof line, file)) {
    /* hierarchy:controllers:path */
    char *controllers = strchr(line, ':'), *name = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!name) continue;
    *name++ = '\0';
    found = version == 2 ? !controllers[1] && line[0] == '0' : has_word(controllers + 1, "cpu");
    if (found) snprintf(group, PATH_BYTES, "%.*s", (int)strcspn(name, "\n"), name);
  }
  if (file) fclose(file);
  return found;
}

static int quota_of(const char *root, int version) {
  char path[PATH_BYTES], line[2 * PATH_BYTES], group[PATH_BYTES];
  int least = INT32_MAX;
  if (!find_group(root, version, group)) return least;
  snprintf(path, sizeof path, "%s/proc/self/mountinfo", root);
  FILE *file = fopen(path, "re");
  while (file && fgets(line, sizeof line, file)) {
    /* id parent major:minor root mount-point options [more] - type source super-options */
    char top[PATH_BYTES], mount[PATH_BYTES], type[32], super[PATH_BYTES];
    const char *behind = strstr(line, " - ");
    if (!behind || sscanf(line, "%*s %*s %*s %4095s %4095s", top, mount) != 2 ||
        sscanf(behind, " - %31s %*s %4095s", type, super) != 2)
      continue;
    if (version == 2 ? strcmp(type, "cgroup2") : strcmp(type, "cgroup") || !has_word(super, "cpu")) continue;
    /* In a container, the mount may begin at the process's own cgroup, while /proc/self/cgroup has its full path. */
    size_t length = strcmp(top, "/") ? strlen(top) : 0;
    int below = !strncmp(group, top, length) && (!group[length] || group[length] == '/');
    const char *rest = below && strcmp(group + length, "/") ? group + length : "";
    int quota = quota_above(root, mount, rest, version);
    if (quota < least) least = quota;
  }
  if (file) fclose(file);
  return least;
}

int dsa_cpu_quota(const char *root) {
  int v1 = quota_of(root, 1), v2 = quota_of(root, 2);
  return v1 < v2 ? v1 : v2;
}

int dsa_usable_cpus(void) {
  /* A thread pool may have bound the calling thread to one CPU, so look at the main thread too. */
  int here = cpus_of(0), all = cpus_of(getpid()), quota = dsa_cpu_quota("");
  int cpus = all > here ? all : here;
  if (cpus > quota) cpus = quota;
  return cpus > 0 ? cpus : 1;
}
