/* Several callers at once on the library's threads, with more tasks than threads and fewer. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/internal.h"

enum { CALLERS = 5, ROUNDS = 2000, MOST_TASKS = 97 };

struct work {
  int64_t out[MOST_TASKS];
  int64_t factor;
};

static void task(void *arg, int64_t index) {
  struct work *work = arg;
  volatile int64_t spent = 0;
  for (int64_t i = 0; i < index * 37 % 400; i++) spent += i;
  work->out[index] += (index + 1) * work->factor;
}

static void *call(void *arg) {
  int64_t caller = (int64_t)(intptr_t)arg;
  for (int64_t round = 0; round < ROUNDS; round++) {
    struct work work = {.factor = caller + round};
    struct dsa_executor executor = dsa_pool_executor((int32_t)(1 + (round + caller) % 7));
    int64_t count = (round * 7 + caller) % (MOST_TASKS + 1);
    dsa_parallel_for(&executor, executor.threads, count, task, &work);
    for (int64_t i = 0; i < MOST_TASKS; i++)
      if (work.out[i] != (i < count ? (i + 1) * work.factor : 0)) {
        puts("a task was left out, or ran twice");
        exit(1);
      }
  }
  return NULL;
}

int main(void) {
  pthread_t callers[CALLERS];
  for (int i = 0; i < CALLERS; i++)
    if (pthread_create(&callers[i], NULL, call, (void *)(intptr_t)i)) return 1;
  for (int i = 0; i < CALLERS; i++) pthread_join(callers[i], NULL);
  dsa_stop_threads(30);
  puts("ok");
  return 0;
}
