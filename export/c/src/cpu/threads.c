/* The library's own threads. A loop is computed by the thread that asks for it, and by as many others as come in time.
 *
 * This is no OpenMP, for five things that callers need: no thread that is slow to wake is waited for, only those that
 * have begun a task; where the system gives no thread the caller computes alone, instead of the process ending; a child
 * made by fork has threads again, whatever libraries its parent used; callers share the threads, instead of having a
 * team each; and the threads can be stopped before the library's code is unloaded. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "cpu/cpus.h"
#include "common/internal.h"

/* More threads are never of use: results do not depend on their number, and speed does not beyond that of the CPUs. */
enum { MOST_THREADS = 1024, MOST_THREADS_PER_CPU = 4 };
enum { STACK_BYTES = 2 << 20 };
/* Waiting threads look for this long before they sleep: stages follow each other, and a sleeper takes longer to wake. */
enum { SPIN_NANOSECONDS = 20000 };
enum { SECONDS_BETWEEN_ATTEMPTS = 1 };

/* A loop, on the stack of its caller. */
struct job {
  struct job *next;
  dsa_task task;
  void *arg;
  int64_t count;
  _Atomic int64_t index; /* of the next task */
  int places;            /* how many more threads may join; with the mutex held */
  atomic_int inside;     /* how many have joined and are at it; changed with the mutex held */
  pthread_cond_t left;
};

struct pool {
  pthread_mutex_t mutex;
  pthread_cond_t posted;
  struct job *jobs;  /* those with places, the oldest first */
  atomic_int places; /* of all jobs */
  int busy;          /* threads in jobs */
  int spinning, idle;
  int threads;
  int stopping;
  int cpus; /* of the process; 0: not known yet */
  pid_t process;
  time_t next_attempt; /* to make a thread, after one has failed */
};

#define EMPTY_POOL {.mutex = PTHREAD_MUTEX_INITIALIZER, .posted = PTHREAD_COND_INITIALIZER}
static struct pool pool = EMPTY_POOL;
static pthread_t handles[MOST_THREADS];

static atomic_int process_threads; /* what dsa_tvm_set_num_threads set */
static atomic_int usable_cpus;     /* 0: not known yet */
static int threads_set, threads_limit = MOST_THREADS; /* by OMP_NUM_THREADS and OMP_THREAD_LIMIT */

/* A child has none of its parent's threads, and perhaps a mutex that one of them holds. It begins again. */
static void after_fork_in_child(void) {
  pool = (struct pool)EMPTY_POOL;
  pool.process = getpid();
  usable_cpus = 0;
}

int dsa_process_cpus(void) {
  int cpus = usable_cpus;
  if (!cpus) usable_cpus = cpus = dsa_usable_cpus();
  return cpus;
}

/* The number at the start of an environment variable, such as 4 of "4,2"; `otherwise` where there is none. */
static int from_environment(const char *name, int otherwise) {
  const char *text = getenv(name);
  char *end;
  long value = text ? strtol(text, &end, 10) : 0;
  if (!text || end == text || value <= 0) return otherwise;
  while (*end == ' ' || *end == '\t') end++;
  return *end && *end != ',' ? otherwise : value < MOST_THREADS ? (int)value : MOST_THREADS;
}

/* The environment is read now, not in a call: another thread of the program may be changing it then. */
__attribute__((constructor)) static void begin(void) {
  pool.process = getpid();
  pthread_atfork(NULL, NULL, after_fork_in_child);
  threads_set = from_environment("OMP_NUM_THREADS", 0);
  threads_limit = from_environment("OMP_THREAD_LIMIT", MOST_THREADS);
}

static int bounded(int threads) { return threads < threads_limit ? threads : threads_limit; }

void dsa_tvm_set_num_threads(int32_t num_threads) {
  process_threads = num_threads > 0 ? bounded(num_threads) : 0;
  if (num_threads <= 0) usable_cpus = 0; /* look again */
}

int32_t dsa_tvm_get_num_threads(void) {
  int threads = process_threads;
  if (threads) return threads;
  return bounded(threads_set ? threads_set : dsa_process_cpus());
}

static int64_t nanoseconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * (int64_t)1000000000 + now.tv_nsec;
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Waits a while for a number to be zero, or not to be. */
static void spin_while(atomic_int *number, int zero) {
  int64_t end = nanoseconds() + SPIN_NANOSECONDS;
  while ((atomic_load_explicit(number, memory_order_relaxed) == 0) == zero) {
    for (int i = 0; i < 16; i++) pause_briefly();
    if (nanoseconds() >= end) return;
  }
}

static void compute(struct job *job) {
  int64_t i;
  while ((i = atomic_fetch_add_explicit(&job->index, 1, memory_order_relaxed)) < job->count) job->task(job->arg, i);
}

static void take_off(struct job *job) {
  struct job **at = &pool.jobs;
  while (*at && *at != job) at = &(*at)->next;
  if (*at) *at = job->next;
  pool.places -= job->places;
  job->places = 0;
}

static void *work(void *unused) {
  (void)unused;
  int looked = 0;
  pthread_mutex_lock(&pool.mutex);
  while (!pool.stopping) {
    struct job *job = pool.jobs;
    if (job) {
      pool.busy++;
      job->inside++;
      pool.places--;
      if (!--job->places) take_off(job);
      pthread_mutex_unlock(&pool.mutex);
      compute(job);
      looked = 0;
      pthread_mutex_lock(&pool.mutex);
      pool.busy--;
      if (!--job->inside) pthread_cond_signal(&job->left);
    } else if (!looked && pool.cpus > 1) {
      looked = 1;
      pool.spinning++;
      pthread_mutex_unlock(&pool.mutex);
      spin_while(&pool.places, 1);
      pthread_mutex_lock(&pool.mutex);
      pool.spinning--;
    } else {
      pool.idle++;
      pthread_cond_wait(&pool.posted, &pool.mutex);
      pool.idle--;
    }
  }
  pthread_mutex_unlock(&pool.mutex);
  return NULL;
}

/* The first thread that calls may be bound to one CPU; what it starts must not be. */
static void use_all_cpus(pthread_attr_t *attr) {
  cpu_set_t mine, all;
  if (sched_getaffinity(0, sizeof mine, &mine) || sched_getaffinity(getpid(), sizeof all, &all)) return;
  if (CPU_COUNT(&all) > CPU_COUNT(&mine)) pthread_attr_setaffinity_np(attr, sizeof all, &all);
}

static int start_thread(pthread_t *handle) {
  static const int own[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS, SIGPROF};
  pthread_attr_t attr;
  sigset_t blocked, before;
  if (pthread_attr_init(&attr)) return ENOMEM;
  use_all_cpus(&attr);
  /* The program's signals are for its own threads. */
  sigfillset(&blocked);
  for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) sigdelset(&blocked, own[i]);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  pthread_attr_setstacksize(&attr, STACK_BYTES);
  int error = pthread_create(handle, &attr, work, NULL);
  /* EINVAL: a stack is too small for the thread-local data of this program, or a CPU has gone. */
  if (error == EINVAL) error = pthread_create(handle, NULL, work, NULL);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attr);
  return error;
}

/* Makes as many threads as the jobs have places for, as far as there are CPUs for them. */
static void grow(int wanted_by_this_job) {
  int most = pool.cpus - 1, asked = wanted_by_this_job;
  if (asked > MOST_THREADS_PER_CPU * pool.cpus) asked = MOST_THREADS_PER_CPU * pool.cpus;
  if (most < asked) most = asked;
  if (most > MOST_THREADS) most = MOST_THREADS;
  int wanted = pool.places + pool.busy;
  if (wanted > most) wanted = most;
  if (pool.threads >= wanted) return;
  time_t now = (time_t)(nanoseconds() / 1000000000);
  if (now < pool.next_attempt) return;
  while (pool.threads < wanted) {
    if (start_thread(&handles[pool.threads])) {
      /* No memory, or a limit on processes. Those that there are do the work, in the worst case the caller alone. */
      pool.next_attempt = now + SECONDS_BETWEEN_ATTEMPTS;
      return;
    }
    pool.threads++;
  }
}

static void post(struct job *job) {
  struct job **at = &pool.jobs;
  while (*at) at = &(*at)->next;
  *at = job;
  pool.places += job->places;
  if (!pool.cpus) pool.cpus = dsa_process_cpus();
  int before = pool.threads;
  grow(job->places);
  int wake = job->places - pool.spinning - (pool.threads - before);
  if (wake >= pool.idle)
    pthread_cond_broadcast(&pool.posted);
  else
    for (; wake > 0; wake--) pthread_cond_signal(&pool.posted);
}

static void pool_for(void *state, int threads, int64_t count, dsa_task task, void *arg) {
  (void)state;
  /* pthread_atfork is not told of a child that a bare clone made. */
  if (pool.process != getpid()) {
    for (int64_t i = 0; i < count; i++) task(arg, i);
    return;
  }
  struct job job = {.task = task,
                    .arg = arg,
                    .count = count,
                    .places = (int)(count < threads ? count : threads) - 1,
                    .left = PTHREAD_COND_INITIALIZER};
  int cancelling;
  /* Others work on what is on this thread's stack. */
  pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancelling);
  pthread_mutex_lock(&pool.mutex);
  post(&job);
  int spin = pool.cpus > 1;
  pthread_mutex_unlock(&pool.mutex);
  compute(&job);
  pthread_mutex_lock(&pool.mutex);
  take_off(&job);
  if (job.inside && spin) {
    pthread_mutex_unlock(&pool.mutex);
    spin_while(&job.inside, 0);
    pthread_mutex_lock(&pool.mutex);
  }
  while (job.inside) pthread_cond_wait(&job.left, &pool.mutex);
  pthread_mutex_unlock(&pool.mutex);
  pthread_cond_destroy(&job.left);
  pthread_setcancelstate(cancelling, NULL);
}

void dsa_stop_threads(int seconds) {
  struct timespec end;
  clock_gettime(CLOCK_REALTIME, &end);
  end.tv_sec += seconds;
  pthread_mutex_lock(&pool.mutex);
  pool.stopping = 1;
  pthread_cond_broadcast(&pool.posted);
  pthread_mutex_unlock(&pool.mutex);
  for (int i = 0; i < pool.threads; i++) pthread_timedjoin_np(handles[i], NULL, &end);
}

struct dsa_executor dsa_pool_executor(int32_t num_threads) {
  struct dsa_executor executor = {num_threads > 0 ? bounded(num_threads) : dsa_tvm_get_num_threads(), pool_for, NULL};
  return executor;
}

void dsa_parallel_for(const struct dsa_executor *executor, int threads, int64_t count, dsa_task task, void *arg) {
  if (threads > 1 && count > 1)
    executor->parallel_for(executor->state, threads, count, task, arg);
  else
    for (int64_t i = 0; i < count; i++) task(arg, i);
}
