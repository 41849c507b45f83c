/* Preloaded: memory and threads that are not to be had, and how many blocks of aligned_alloc have not been freed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

enum { SLOTS = 1 << 16 };

int faults_blocks = 1 << 30;  /* so many blocks are still to be had from aligned_alloc */
int faults_threads = 1 << 30; /* and so many threads from the system */
int faults_refused;           /* how often one of both was refused */
static void *blocks[SLOTS];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static size_t slot_of(void *p) {
  size_t i = (uintptr_t)p / 64 * 2654435761u % SLOTS;
  while (blocks[i] && blocks[i] != p) i = (i + 1) % SLOTS;
  return i;
}

int faults_live(void) {
  int count = 0;
  for (int i = 0; i < SLOTS; i++) count += blocks[i] && blocks[i] != (void *)1;
  return count;
}

void *aligned_alloc(size_t alignment, size_t bytes) {
  if (faults_blocks <= 0) {
    faults_refused++;
    return NULL;
  }
  faults_blocks--;
  void *(*real)(size_t, size_t) = (void *(*)(size_t, size_t))dlsym(RTLD_NEXT, "aligned_alloc");
  void *p = real(alignment, bytes);
  pthread_mutex_lock(&mutex);
  if (p) blocks[slot_of(p)] = p;
  pthread_mutex_unlock(&mutex);
  return p;
}

void free(void *p) {
  static void (*real)(void *);
  if (!real) real = (void (*)(void *))dlsym(RTLD_NEXT, "free");
  if (p && (uintptr_t)p % 64 == 0) {
    pthread_mutex_lock(&mutex);
    size_t i = slot_of(p);
    if (blocks[i] == p) blocks[i] = (void *)1; /* the places behind it stay where they are found */
    pthread_mutex_unlock(&mutex);
  }
  real(p);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*start)(void *), void *arg) {
  int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *) =
      (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))dlsym(RTLD_NEXT, "pthread_create");
  if (faults_threads <= 0) {
    faults_refused++;
    return EAGAIN;
  }
  faults_threads--;
  return real(thread, attr, start, arg);
}
