/* An application whose threads all call at once: every operator at many lengths and numbers of threads, each result the
 * bits that one thread gives; calls that are wrong in every way that a tensor can be; and a child made by fork. */
#define _GNU_SOURCE
#include <dirent.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "dsa_tvm/dsa_tvm.h"

enum { CALLERS = 3, ROUNDS = 2, MOST_TENSORS = 12, MOST_RANK = 3, BATCH = 2, D_IDX = 32, D_QK = 512, D_V = 512 };

#define CHECK(condition) \
  do { \
    if (!(condition)) { \
      fprintf(stderr, "line %d: %s: %s\n", __LINE__, #condition, dsa_tvm_last_error()); \
      exit(1); \
    } \
  } while (0)

/* A call of any operator, with memory of its own. */
struct call {
  const char *op;
  dsa_tvm_tensor tensors[MOST_TENSORS];
  int64_t shapes[MOST_TENSORS][MOST_RANK];
  const dsa_tvm_tensor *inputs[MOST_TENSORS];
  dsa_tvm_tensor *outputs[3];
  dsa_tvm_attr attrs[3];
  int num_inputs, num_outputs, num_attrs, used;
  unsigned seed;
};

static float random_number(unsigned *seed) {
  *seed = *seed * 1664525u + 1013904223u;
  return (float)(*seed >> 8) / (float)(1 << 24) - 0.5f;
}

static size_t bytes_of(const dsa_tvm_tensor *t) {
  size_t bytes = t->dtype.bits / 8u;
  for (int i = 0; i < t->ndim; i++) bytes *= (size_t)t->shape[i];
  return bytes;
}

/* Memory of exactly that size, so that a sanitizer sees what is beside it. `most`: of integers. */
static dsa_tvm_tensor *tensor(struct call *c, int code, int64_t a, int64_t b, int64_t d, int64_t most) {
  dsa_tvm_tensor *t = &c->tensors[c->used];
  int64_t *shape = c->shapes[c->used++], lengths[] = {a, b, d};
  memset(t, 0, sizeof *t);
  memcpy(shape, lengths, sizeof lengths);
  t->device.device_type = 1;
  t->ndim = 1 + (b >= 0) + (d >= 0);
  t->dtype.code = (uint8_t)code;
  t->dtype.bits = 32;
  t->dtype.lanes = 1;
  t->shape = shape;
  t->data = malloc(bytes_of(t) + !bytes_of(t));
  for (size_t i = 0; i < bytes_of(t) / 4; i++)
    if (code == DSA_TVM_FLOAT)
      ((float *)t->data)[i] = random_number(&c->seed);
    else
      ((int32_t *)t->data)[i] = (int32_t)((random_number(&c->seed) + 0.5f) * (float)(most + 2)) - 1;
  return t;
}

#define REAL(...) tensor(c, DSA_TVM_FLOAT, __VA_ARGS__, 0)
static void input(struct call *c, const dsa_tvm_tensor *t) { c->inputs[c->num_inputs++] = t; }
static void output(struct call *c, dsa_tvm_tensor *t) { c->outputs[c->num_outputs++] = t; }

static void index_inputs(struct call *c, int64_t s_q, int64_t s_kv) {
  input(c, REAL(s_q, 3, D_IDX));
  input(c, REAL(s_kv, D_IDX, -1));
  input(c, REAL(s_q, 3, -1));
  input(c, tensor(c, DSA_TVM_INT, s_q, -1, -1, s_kv / 2));
  input(c, tensor(c, DSA_TVM_INT, s_q, -1, -1, s_kv + 3));
}

static struct call *make(const char *op, int64_t s_q, int64_t s_kv, int64_t topk) {
  struct call *c = calloc(1, sizeof *c);
  c->op = op;
  c->seed = (unsigned)(s_q * 1000 + s_kv);
  if (!strcmp(op, "topk")) {
    input(c, REAL(s_q, s_kv, -1));
    input(c, tensor(c, DSA_TVM_INT, s_q, -1, -1, s_kv / 2));
    input(c, tensor(c, DSA_TVM_INT, s_q, -1, -1, s_kv + 3));
    c->attrs[c->num_attrs++].i = topk;
    output(c, tensor(c, DSA_TVM_INT, s_q, topk, -1, 0));
  } else if (!strcmp(op, "lightning_indexer") || !strcmp(op, "indexer_topk")) {
    int selects = !strcmp(op, "indexer_topk");
    index_inputs(c, s_q, s_kv);
    input(c, s_q % 2 ? REAL(s_kv, -1, -1) : NULL);
    if (selects) c->attrs[c->num_attrs++].i = topk;
    output(c, selects ? tensor(c, DSA_TVM_INT, s_q, topk, -1, 0) : REAL(s_q, s_kv, -1));
  } else if (!strcmp(op, "sparse_mla")) {
    input(c, REAL(s_q, 5, D_QK));
    input(c, REAL(s_kv, D_QK, -1));
    input(c, tensor(c, DSA_TVM_INT, s_q, topk, -1, s_kv));
    input(c, s_q % 2 ? REAL(5, -1, -1) : NULL);
    input(c, s_q % 3 ? tensor(c, DSA_TVM_INT, s_q, -1, -1, topk) : NULL);
    c->attrs[c->num_attrs++].f = 0.05;
    c->attrs[c->num_attrs++].i = D_V;
    output(c, REAL(s_q, 5, D_V));
    output(c, REAL(s_q, 5, -1));
    output(c, REAL(s_q, 5, -1));
  } else if (!strcmp(op, "dsa_attention")) {
    index_inputs(c, s_q, s_kv);
    input(c, REAL(s_q, 5, D_QK));
    input(c, REAL(s_kv, D_QK, -1));
    input(c, NULL);
    input(c, s_q % 2 ? REAL(5, -1, -1) : NULL);
    c->attrs[c->num_attrs++].i = topk;
    c->attrs[c->num_attrs++].f = 0.05;
    c->attrs[c->num_attrs++].i = D_V;
    output(c, REAL(s_q, 5, D_V));
    output(c, REAL(s_q, 5, -1));
  } else {
    input(c, REAL(BATCH, s_kv, 300));
    input(c, REAL(BATCH, s_q, 300));
    input(c, tensor(c, DSA_TVM_INT, BATCH, s_q, -1, s_kv));
    output(c, REAL(BATCH, s_kv, 300));
  }
  return c;
}

static void destroy(struct call *c) {
  for (int i = 0; i < c->used; i++) free(c->tensors[i].data);
  free(c);
}

static dsa_tvm_status run(struct call *c, int threads) {
  dsa_tvm_options options = {.size = sizeof options, .num_threads = threads};
  return dsa_tvm_call(c->op, c->inputs, c->num_inputs, c->attrs, c->num_attrs, c->outputs, c->num_outputs, &options);
}

/* A plan that all callers use at a time. */
static dsa_tvm_plan *shared;
static struct call *shared_call;

static void run_shared(void) {
  struct call *own = make(shared_call->op, 33, 130, 8);
  dsa_tvm_options options = {.size = sizeof options, .num_threads = 2};
  CHECK(dsa_tvm_run(shared, own->outputs, own->num_outputs, &options) == DSA_TVM_OK);
  for (int i = 0; i < own->num_outputs; i++)
    CHECK(!memcmp(own->outputs[i]->data, shared_call->outputs[i]->data, bytes_of(own->outputs[i])));
  destroy(own);
}

/* Three times, once in two steps, and all have the same bits. */
static void compare(const char *op, int64_t s_q, int64_t s_kv, int64_t topk, int threads) {
  struct call *one = make(op, s_q, s_kv, topk), *many = make(op, s_q, s_kv, topk);
  struct call *planned = make(op, s_q, s_kv, topk);
  int64_t shapes[3][3], told[3][3];
  uint64_t workspace = 1;
  dsa_tvm_plan *plan = dsa_tvm_plan_create();
  dsa_tvm_options options = {.size = sizeof options, .num_threads = threads};
  CHECK(run(one, 1) == DSA_TVM_OK && run(many, threads) == DSA_TVM_OK);
  CHECK(dsa_tvm_output_shapes(op, one->inputs, one->num_inputs, one->attrs, one->num_attrs, shapes, one->num_outputs) ==
        DSA_TVM_OK);
  CHECK(plan && dsa_tvm_prepare(plan, op, planned->inputs, planned->num_inputs, planned->attrs, planned->num_attrs, told,
                                planned->num_outputs, &workspace) == DSA_TVM_OK && !workspace);
  CHECK(dsa_tvm_run(plan, planned->outputs, planned->num_outputs, &options) == DSA_TVM_OK);
  for (int i = 0; i < one->num_outputs; i++) {
    size_t rank = (size_t)one->outputs[i]->ndim, bytes = bytes_of(one->outputs[i]);
    CHECK(!memcmp(shapes[i], one->outputs[i]->shape, sizeof(int64_t) * rank));
    CHECK(!memcmp(shapes[i], told[i], sizeof(int64_t) * rank));
    CHECK(!memcmp(one->outputs[i]->data, many->outputs[i]->data, bytes));
    CHECK(!memcmp(one->outputs[i]->data, planned->outputs[i]->data, bytes));
  }
  dsa_tvm_plan_destroy(plan);
  destroy(one);
  destroy(many);
  destroy(planned);
}

static const char *const ops[] = {"lightning_indexer", "topk", "indexer_topk", "sparse_mla", "dsa_attention", "write_rows"};
enum { NUM_OPS = sizeof ops / sizeof *ops };

/* The nth way in which a tensor is wrong; 0 behind the last. */
static int spoil(dsa_tvm_tensor *t, int way, int64_t *lengths) {
  memcpy(lengths, t->shape, sizeof(int64_t) * (size_t)t->ndim);
  int64_t *last = &lengths[t->ndim - 1];
  t->shape = lengths;
  switch (way) {
    case 0: return t->shape = NULL, 1;
    case 1: return t->data = NULL, 1;
    case 2: return t->ndim = 0, 1;
    case 3: return t->ndim = -1, 1;
    case 4: return t->ndim = INT32_MAX, 1;
    case 5: return *last = -1, 1;
    case 6: return *last = INT64_MAX, 1;
    case 7: return *last = INT64_MIN, 1;
    case 8: return lengths[0] = -3, 1;
    case 9: return t->dtype.code = 255, 1;
    case 10: return t->dtype.bits = 0, 1;
    case 11: return t->dtype.bits = 255, 1;
    case 12: return t->dtype.lanes = 0, 1;
    case 13: return t->dtype.lanes = UINT16_MAX, 1;
    case 14: return t->device.device_type = 2, 1;
    case 15: return t->device.device_type = -1, 1;
    case 16: return t->byte_offset = UINT64_MAX, 1;
    case 17: return t->byte_offset = 1, 1;
    case 18: return t->data = (void *)(UINTPTR_MAX - 7), 1;
    default: return 0;
  }
}

static void refuse(const char *op) {
  struct call *c = make(op, 3, 70, 9);
  int tried = 0;
  CHECK(run(c, 1) == DSA_TVM_OK);
  for (int i = 0; i < c->used; i++) {
    dsa_tvm_tensor good = c->tensors[i];
    int64_t lengths[MOST_RANK];
    for (int way = 0; spoil(&c->tensors[i], way, lengths); way++, c->tensors[i] = good, tried++) {
      CHECK(run(c, 2) == DSA_TVM_INVALID_ARGUMENT && !strncmp(dsa_tvm_last_error(), op, strlen(op)));
    }
    c->tensors[i] = good;
    for (int rank = 0; rank < good.ndim; rank++) {
      int64_t strides[MOST_RANK] = {0};
      strides[rank] = INT64_MIN;
      c->tensors[i].strides = strides;
      CHECK(run(c, 2) == DSA_TVM_INVALID_ARGUMENT);
      c->tensors[i] = good;
    }
  }
  for (int i = 0; i < c->num_attrs; i++) {
    static const int64_t wrong[] = {0, -1, INT64_MIN, INT64_MAX};
    dsa_tvm_attr good = c->attrs[i];
    for (int w = 0; w < 4; w++) {
      c->attrs[i].i = wrong[w];
      if (good.i < 1 << 20) CHECK(run(c, 2) == DSA_TVM_INVALID_ARGUMENT);
    }
    c->attrs[i] = good;
  }
  CHECK(tried > 50 && run(c, 2) == DSA_TVM_OK);
  destroy(c);
}

static void *caller(void *arg) {
  /* The last are long enough for several threads. */
  static const int64_t lengths[][2] = {{1, 64}, {0, 5}, {4, 0}, {33, 130}, {250, 450}};
  enum { NUM_LENGTHS = sizeof lengths / sizeof *lengths };
  int me = (int)(intptr_t)arg;
  for (int round = 0; round < ROUNDS; round++) {
    for (int i = 0; i < NUM_OPS; i++) {
      const char *op = ops[(i + me) % NUM_OPS];
      for (int j = 0; j < NUM_LENGTHS - (round > 0); j++)
        compare(op, lengths[j][0], lengths[j][1], 1 + j * 7, 2 + (me + round + j) % 4);
      if (!round) refuse(op);
      run_shared();
    }
    dsa_tvm_set_num_threads(round);
    CHECK(dsa_tvm_get_num_threads() >= 1);
  }
  return NULL;
}

/* Of this process. */
static int count_threads(void) {
  int count = 0;
  DIR *tasks = opendir("/proc/self/task");
  CHECK(tasks);
  for (struct dirent *d = readdir(tasks); d; d = readdir(tasks)) count += d->d_name[0] != '.';
  closedir(tasks);
  return count;
}

int main(int argc, char **argv) {
  (void)argv;
  pthread_t threads[CALLERS];
  CHECK(dsa_tvm_target());
  int64_t shapes[3][3];
  uint64_t workspace;
  shared = dsa_tvm_plan_create();
  shared_call = make("indexer_topk", 33, 130, 8);
  CHECK(run(shared_call, 1) == DSA_TVM_OK);
  CHECK(dsa_tvm_prepare(shared, shared_call->op, shared_call->inputs, shared_call->num_inputs, shared_call->attrs,
                        shared_call->num_attrs, shapes, shared_call->num_outputs, &workspace) == DSA_TVM_OK);
  for (int i = 0; i < CALLERS; i++) CHECK(!pthread_create(&threads[i], NULL, caller, (void *)(intptr_t)i));
  for (int i = 0; i < CALLERS; i++) pthread_join(threads[i], NULL);
  CHECK(count_threads() > 1);
  if (argc > 1) {
    /* ThreadSanitizer does not follow a fork of a process with threads. */
    pid_t child = fork();
    if (!child) {
      compare("indexer_topk", 250, 450, 30, 4);
      _exit(0);
    }
    int status;
    CHECK(child > 0 && waitpid(child, &status, 0) == child && status == 0);
  }
  dsa_tvm_plan_destroy(shared);
  destroy(shared_call);
  puts("ok");
  return 0;
}
