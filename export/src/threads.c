/* The library's own executor: OpenMP, so that there is one pool in the process and OMP_NUM_THREADS is heeded. */
#define _GNU_SOURCE
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

#include "internal.h"

/* More are never of use, and OpenMP ends the process when it cannot make a thread it was asked for. The results do not
 * depend on the number. */
enum { MOST_THREADS = 1024 };

static atomic_int process_threads;

/* A child made by fork has none of the pool's threads, and OpenMP waits for them for ever: compute alone there. */
static atomic_int in_forked_child;

static void after_fork_in_child(void) { in_forked_child = 1; }

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

void dsa_tvm_set_num_threads(int32_t num_threads) { process_threads = num_threads > 0 ? num_threads : 0; }

int32_t dsa_tvm_get_num_threads(void) { return dsa_default_threads(); }

int dsa_default_threads(void) {
  int chosen = process_threads;
  if (in_forked_child) return 1;
  return chosen ? chosen : omp_get_max_threads();
}

int dsa_process_cpus(void) {
  /* A pool may have bound the calling thread to one of them. */
  cpu_set_t allowed;
  int here = omp_get_num_procs(), all = 0;
  if (!sched_getaffinity(getpid(), sizeof allowed, &allowed)) all = CPU_COUNT(&allowed);
  return all > here ? all : here;
}

static void openmp_for(void *state, int64_t count, dsa_task task, void *arg) {
  int threads = (int)(intptr_t)state;
  if (count < threads) threads = (int)count;
  if (threads <= 1) {
    for (int64_t i = 0; i < count; i++) task(arg, i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < count; i++) task(arg, i);
}

struct dsa_executor dsa_openmp_executor(int32_t num_threads) {
  int threads = num_threads > 0 ? num_threads : dsa_default_threads();
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  if (in_forked_child) threads = 1;
  struct dsa_executor executor = {threads, openmp_for, (void *)(intptr_t)threads};
  return executor;
}
