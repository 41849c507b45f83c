/* The library's own threads. The thread that asks for a loop computes it, with the help of all others that come in
 * time.
 *
 * OpenMP lacks five things that callers need. A call waits only for threads that have begun a task, not for one that is
 * slow to wake. If the system gives no thread, the caller computes alone, and the process does not end. A child made by
 * fork has threads again, whatever libraries its parent used. All callers share one set of threads. And the threads can
 * be stopped before the code of the library is unloaded. */
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

/* More threads are useless: results do not depend on their number, and no more threads than CPUs run at a time. */
enum { MOST_THREADS = 1024, MOST_THREADS_PER_CPU = 4 };
enum { STACK_BYTES = 2 << 20 };
/* Threads spin for this long before they sleep: the next stage comes soon, and a sleeping thread takes long to wake. */
enum { SPIN_NANOSECONDS = 20000 };
enum { SECONDS_BETWEEN_ATTEMPTS = 1 };

/* A loop. It lies on the stack of its caller. */
struct job {
  struct job *next;
  dsa_task task;
  void *arg;
  int64_t count;
  _Atomic int64_t index; /* of the next task */
  int places;            /* how many more threads may join; needs the mutex */
  atomic_int inside;     /* how many threads have joined and not left; changed only with the mutex */
  pthread_cond_t left;
};

struct pool {
  pthread_mutex_t mutex;
  pthread_cond_t posted;
  struct job *jobs;  /* jobs that have places, the oldest first */
  atomic_int places; /* of all jobs */
  int busy;          /* threads that work on jobs */
  int spinning, idle;
  int threads;
  int stopping;
  int cpus; /* of the process, when the latest job was posted */
  pid_t process;
  time_t next_attempt; /* when to try to start a thread again, after a failure */
};

#define EMPTY_POOL {.mutex = PTHREAD_MUTEX_INITIALIZER, .posted = PTHREAD_COND_INITIALIZER}
static struct pool pool = EMPTY_POOL;
static pthread_t handles[MOST_THREADS];

static atomic_int process_threads; /* what dsa_tvm_set_num_threads set */
static atomic_int usable_cpus;     /* 0: not known yet */
static int threads_set, threads_limit = MOST_THREADS; /* by OMP_NUM_THREADS and OMP_THREAD_LIMIT */

/* A child has no threads of its parent, and the mutex may be locked by one of them. So it starts afresh. */
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

/* The number at the start of an environment variable, such as 4 in "4,2"; `otherwise` if there is none. */
static int from_environment(const char *name, int otherwise) {
  const char *text = getenv(name);
  char *end;
  long value = text ? strtol(text, &end, 10) : 0;
  if (!text || end == text || value <= 0) return otherwise;
  while (*end == ' ' || *end == '\t') end++;
  return *end && *end != ',' ? otherwise : value < MOST_THREADS ? (int)value : MOST_THREADS;
}

/* Read the environment at load time: during a call, another thread of the program may be changing it. */
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

/* Spins while a number is zero (or is not zero), but not for long. */
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

/* The calling thread may be bound to one CPU. The threads that it starts must not be. */
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
  /* Signals to the program are for its own threads. */
  sigfillset(&blocked);
  for (size_t i = 0; i < sizeof own / sizeof own[0]; i++) sigdelset(&blocked, own[i]);
  pthread_sigmask(SIG_SETMASK, &blocked, &before);
  pthread_attr_setstacksize(&attr, STACK_BYTES);
  int error = pthread_create(handle, &attr, work, NULL);
  /* EINVAL: the stack is too small for the thread-local data of this program, or a CPU has gone offline. */
  if (error == EINVAL) error = pthread_create(handle, NULL, work, NULL);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attr);
  return error;
}

/* Starts threads for the free places of all jobs, but not more than there are CPUs. */
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
      /* There is no memory, or a limit on processes. The threads that exist do the work, perhaps the caller alone. */
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
  pool.cpus = dsa_process_cpus(); /* dsa_tvm_set_num_threads(0) has them counted again */
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
  /* A child made by a bare clone does not run the handlers of pthread_atfork. */
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
  /* Other threads use the job on the stack of this one, so it must not be cancelled. */
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
