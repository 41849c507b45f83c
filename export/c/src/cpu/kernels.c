/* Calls compiled kernels, and offers the few services that their code needs. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "common/float_mode.h"
#include "common/internal.h"

enum { WORKSPACE_ALIGNMENT = 64 }; /* the generated code assumes this */

/* Lies in front of each workspace, and links it into one of the two lists of its thread. */
struct workspace {
  struct workspace *previous, *next;
  size_t bytes;
  char padding[WORKSPACE_ALIGNMENT - 2 * sizeof(struct workspace *) - sizeof(size_t)];
};

/* `held` lists the workspaces of the running kernel, because a kernel that fails leaves them behind. `kept` lists those
 * of earlier kernels, until the thread ends: new memory costs a page fault for every 4 KiB, which is more than a small
 * kernel takes. */
enum { MOST_KEPT_BYTES = 1 << 20 };
struct thread {
  struct workspace *held, *kept;
  size_t kept_bytes;
  int frees_at_end; /* whether `kept` will be freed when the thread ends */
  int out_of_memory;
  char message[512]; /* of a check in a kernel that failed */
};
static _Thread_local struct thread of_each_thread;

/* A kernel takes a dozen workspaces, and in a shared library every mention of a thread's own variable is a call. So a
 * function asks once. Inlined, this one would become such mentions again. */
__attribute__((noinline)) static struct thread *this_thread(void) { return &of_each_thread; }

static pthread_key_t at_thread_end;
static int keeps;

/* The only function that the generated code links to. It reports that a check in that code has failed. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t num_parts) {
  struct thread *t = this_thread();
  size_t used = (size_t)snprintf(t->message, sizeof t->message, "%s: ", kind);
  for (int32_t i = 0; i < num_parts && used < sizeof t->message; i++)
    if (parts[i]) used += (size_t)snprintf(t->message + used, sizeof t->message - used, "%s", parts[i]);
}

static void put(struct workspace **list, struct workspace *w) {
  w->previous = NULL;
  w->next = *list;
  if (w->next) w->next->previous = w;
  *list = w;
}

static void take(struct workspace **list, struct workspace *w) {
  if (w->next) w->next->previous = w->previous;
  if (w->previous)
    w->previous->next = w->next;
  else
    *list = w->next;
}

static void free_kept(void *unused) {
  (void)unused;
  struct thread *t = this_thread();
  while (t->kept) {
    struct workspace *w = t->kept;
    take(&t->kept, w);
    free(w);
  }
  t->kept_bytes = 0;
  t->frees_at_end = 0;
}

static struct workspace *fresh(struct thread *t, size_t bytes) {
  struct workspace *w = aligned_alloc(WORKSPACE_ALIGNMENT, sizeof *w + bytes);
  if (!w && t->kept) {
    free_kept(NULL);
    w = aligned_alloc(WORKSPACE_ALIGNMENT, sizeof *w + bytes);
  }
  if (w) w->bytes = bytes;
  return w;
}

static void *allocate(int device_type, int device_id, uint64_t bytes, int type_code, int type_bits) {
  (void)device_type, (void)device_id, (void)type_code, (void)type_bits;
  struct thread *t = this_thread();
  struct workspace *w = NULL;
  /* A size near 2**64 must not wrap to a small one. */
  if (bytes < UINT64_MAX / 2) {
    size_t whole = (size_t)((bytes + WORKSPACE_ALIGNMENT - 1) / WORKSPACE_ALIGNMENT * WORKSPACE_ALIGNMENT);
    for (w = t->kept; w && (w->bytes < whole || w->bytes / 2 > whole); w = w->next) continue;
    if (w) {
      take(&t->kept, w);
      t->kept_bytes -= w->bytes;
    } else {
      w = fresh(t, whole);
    }
  }
  if (!w) {
    t->out_of_memory = 1;
    return NULL;
  }
  put(&t->held, w);
  return w + 1;
}

/* Whether what the thread keeps will be freed when it ends. A thread that has freed it while ending, and then calls a
 * kernel from another destructor, asks again. */
static int frees_at_end(struct thread *t) {
  if (!t->frees_at_end) t->frees_at_end = keeps && !pthread_setspecific(at_thread_end, t);
  return t->frees_at_end;
}

static int release(int device_type, int device_id, void *p) {
  (void)device_type, (void)device_id;
  if (!p) return 0;
  struct thread *t = this_thread();
  struct workspace *w = (struct workspace *)p - 1;
  take(&t->held, w);
  if (w->bytes <= MOST_KEPT_BYTES - t->kept_bytes && frees_at_end(t)) {
    put(&t->kept, w);
    t->kept_bytes += w->bytes;
  } else {
    free(w);
  }
  return 0;
}

/* The generated code calls through these pointers. Its objects define those that they use. */
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) __attribute__((weak));
extern int (*__TVMBackendFreeWorkspace)(int, int, void *) __attribute__((weak));

__attribute__((constructor)) static void offer_services(void) {
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = allocate;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = release;
  keeps = !pthread_key_create(&at_thread_end, free_kept);
}

/* A library that is made for measuring is unloaded. Threads that end later must not call into it. */
__attribute__((destructor)) static void withdraw_services(void) {
  if (keeps) pthread_key_delete(at_thread_end);
  keeps = 0;
  free_kept(NULL);
}

struct tvm_any dsa_arg_tensor(dsa_tvm_tensor *tensor) {
  struct tvm_any any = {TVM_TENSOR_POINTER, 0, {.p = tensor}};
  return any;
}

struct tvm_any dsa_arg_int(int64_t value) {
  struct tvm_any any = {TVM_INT, 0, {.i = value}};
  return any;
}

struct tvm_any dsa_arg_float(double value) {
  struct tvm_any any = {TVM_FLOAT, 0, {.f = value}};
  return any;
}

static void report(struct dsa_outcome *outcome, const struct thread *t) {
  /* Several tasks may fail at a time. Keep the message of the first. */
  if (atomic_exchange(&outcome->failed, 1)) return;
  outcome->status = t->out_of_memory ? DSA_TVM_OUT_OF_MEMORY : DSA_TVM_INTERNAL;
  snprintf(outcome->message, sizeof outcome->message, "%s",
           t->out_of_memory ? "no memory for the workspace of a task" : t->message);
}

void dsa_call_kernel(struct dsa_outcome *outcome, dsa_kernel kernel, const struct tvm_any *args, int num_args) {
  struct thread *t = this_thread();
  struct tvm_any result = {0, 0, {0}};
  if (outcome->failed) return;
  t->message[0] = '\0';
  t->out_of_memory = 0;
  if (!kernel) {
    /* A library that is made for measuring lacks most kernels. */
    snprintf(t->message, sizeof t->message, "no kernel for these element types in this library");
    report(outcome, t);
    return;
  }
  const struct dsa_float_mode mode = dsa_enter_float_mode();
  int failed = kernel(NULL, args, num_args, &result);
  dsa_leave_float_mode(mode);
  if (!failed) return;
  while (t->held) release(CPU_DEVICE, 0, t->held + 1);
  report(outcome, t);
}
