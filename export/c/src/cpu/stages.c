/* How each stage is cut into tasks. Every value is computed by one kernel call in one order, so the results do not
 * depend on the number of threads or on where the cuts fall. */
#include "cpu/stages.h"

static int sees(const struct scoring *s, int64_t m, int64_t n0, int64_t n1) {
  int32_t ks = ((const int32_t *)s->ks.data)[m], ke = ((const int32_t *)s->ke.data)[m];
  return ks < ke && ks < n1 && n0 < ke;
}

/* Times of the stages on one thread of an Ice Lake Xeon (x86-64-v4), as measured. There, waking a second thread takes
 * about 10 us, and pays from 80 us of work on. On slower machines it would pay for somewhat less work than this
 * assumes. */
enum { PICOSECONDS_A_PRODUCT = 10, PICOSECONDS_A_LOGIT = 1000, LEAST_NANOSECONDS = 40000 };

/* Integers that do not overflow: the floating-point mode here is the caller's, which may have traps enabled. */
static int64_t product(int64_t a, int64_t b) {
  int64_t c;
  return __builtin_mul_overflow(a, b, &c) ? INT64_MAX : c;
}

/* The time for scoring this many pairs of a query and a key. */
static int64_t scoring_time(const struct scoring *s, int64_t pairs) {
  int64_t products = product(pairs, s->q.shape[1] * s->q.shape[2]);
  return product(products, PICOSECONDS_A_PRODUCT) / 1000;
}

static int64_t selection_time(const struct selection *s, int64_t queries) {
  return product(product(queries, s->logits.shape[1]), PICOSECONDS_A_LOGIT) / 1000;
}

static int64_t attention_time(const struct attention *a, int64_t queries) {
  int64_t products = product(product(queries, a->h_q), product(a->indices.shape[1], 2 * a->q.shape[2]));
  return product(products, PICOSECONDS_A_PRODUCT) / 1000;
}

int dsa_stage_threads(const struct dsa_executor *executor, int64_t nanoseconds) {
  int64_t threads = nanoseconds / LEAST_NANOSECONDS;
  return threads < executor->threads ? (threads > 1 ? (int)threads : 1) : executor->threads;
}

static void score(struct scoring *s, int64_t m0, int64_t m1, int64_t n0, int64_t n1) {
  const struct tvm_any args[] = {dsa_arg_tensor(&s->q),  dsa_arg_tensor(&s->k),       dsa_arg_tensor(&s->weights),
                                 dsa_arg_tensor(&s->ks), dsa_arg_tensor(&s->ke),      dsa_arg_tensor(&s->k_scale),
                                 dsa_arg_tensor(&s->logits), dsa_arg_int(m0),         dsa_arg_int(m1),
                                 dsa_arg_int(n0),        dsa_arg_int(n1),             dsa_arg_int(m0 - s->m0),
                                 dsa_arg_int(s->scaled)};
  dsa_call_kernel(s->outcome, s->kernel, args, sizeof args / sizeof args[0]);
}

static void score_task(void *arg, int64_t index) {
  struct scoring *s = arg;
  int64_t m0 = s->m0 + index / s->key_tasks * s->rows, n0 = index % s->key_tasks * s->keys;
  score(s, m0, minimum(m0 + s->rows, s->m1), n0, minimum(n0 + s->keys, s->s_kv));
}

static void score_visible_task(void *arg, int64_t index) {
  struct scoring *s = arg;
  int64_t low = 0, high = s->num_visible;
  while (high - low > 1) {
    int64_t middle = (low + high) / 2;
    *(s->visible[middle].first_task <= index ? &low : &high) = middle;
  }
  const struct visible *v = &s->visible[low];
  int64_t n0 = v->n0 + (index - v->first_task) * s->keys, n1 = minimum(n0 + s->keys, v->n1), m0 = v->m0, m1 = v->m1;
  /* Leave out queries that see none of these keys: packing them and writing their logits takes time. */
  while (m0 < m1 && !sees(s, m0, n0, n1)) m0++;
  while (m0 < m1 && !sees(s, m1 - 1, n0, n1)) m1--;
  if (m0 < m1) score(s, m0, m1, n0, n1);
}

/* Finds the keys that the queries see, in whole blocks, and returns how many these are. Unused rows of a cache and the
 * rows of other sequences are left out. Queries of a task are scored together if their keys overlap. */
static int64_t find_visible(struct scoring *s, int64_t block) {
  const int32_t *ks = s->ks.data, *ke = s->ke.data;
  struct visible *v = NULL;
  int64_t keys = 0;
  s->num_visible = 0;
  for (int64_t m = s->m0; m < s->m1; m++) {
    if ((m - s->m0) % s->rows == 0) v = NULL;
    int64_t n0 = ks[m] > 0 ? ks[m] / block * block : 0, n1 = minimum(ke[m], s->s_kv);
    if (ks[m] >= n1 || n1 <= 0) continue;
    n1 = minimum(divide_up(n1, block) * block, s->s_kv);
    if (!v || n1 < v->n0 || v->n1 < n0) {
      v = &s->visible[s->num_visible++];
      *v = (struct visible){m, m, n0, n0, 0};
    }
    keys -= v->n1 - v->n0;
    v->m1 = m + 1;
    if (n0 < v->n0) v->n0 = n0;
    if (n1 > v->n1) v->n1 = n1;
    keys += v->n1 - v->n0;
  }
  return keys;
}

/* Numbers the tasks of `s->keys` keys each, and returns how many there are. */
static int64_t number_tasks(struct scoring *s) {
  int64_t tasks = 0;
  for (int64_t i = 0; i < s->num_visible; i++) {
    s->visible[i].first_task = tasks;
    tasks += divide_up(s->visible[i].n1 - s->visible[i].n0, s->keys);
  }
  return tasks;
}

/* The number of pairs of a query and a key that are scored. */
static int64_t pairs_of(const struct scoring *s) {
  if (!s->visible) return product(s->m1 - s->m0, s->s_kv);
  int64_t pairs = 0;
  for (int64_t i = 0; i < s->num_visible; i++) {
    const struct visible *v = &s->visible[i];
    pairs += (v->m1 - v->m0) * (v->n1 - v->n0);
  }
  return pairs;
}

void dsa_score(struct scoring *s, const struct indexer_kernel *cut, const struct dsa_executor *executor) {
  int64_t queries = s->m1 - s->m0, block = cut->block_keys;
  if (!queries || !s->s_kv) return;
  s->rows = minimum(cut->rows, queries);
  int64_t row_tasks = divide_up(queries, s->rows);
  int64_t keys = s->visible ? find_visible(s, block) : s->s_kv * row_tasks;
  /* Several tasks for each thread, so that dynamic scheduling balances tasks of different lengths. */
  int threads = dsa_stage_threads(executor, scoring_time(s, pairs_of(s)));
  int64_t wanted = threads > 1 ? cut->tasks_per_thread * threads : 1;
  /* For few queries, runs of keys are shorter, so that every thread has work, but long enough to pay for packing q. */
  s->keys = cut->task_keys;
  if ((s->visible ? number_tasks(s) : row_tasks * divide_up(s->s_kv, s->keys)) < wanted)
    s->keys = divide_up(divide_up(keys, wanted), block) * block;
  if (s->keys < cut->min_keys) s->keys = divide_up(cut->min_keys, block) * block;
  s->key_tasks = divide_up(s->s_kv, s->keys);
  if (s->visible)
    dsa_parallel_for(executor, threads, number_tasks(s), score_visible_task, s);
  else
    dsa_parallel_for(executor, threads, row_tasks * s->key_tasks, score_task, s);
}

static void select_task(void *arg, int64_t index) {
  struct selection *s = arg;
  const struct tvm_any args[] = {dsa_arg_tensor(&s->logits), dsa_arg_tensor(&s->ks),    dsa_arg_tensor(&s->ke),
                                 dsa_arg_tensor(&s->indices), dsa_arg_int(s->m0 + index),
                                 dsa_arg_int(s->m0 + index + 1), dsa_arg_int(index),
                                 dsa_arg_int(s->out0 + index)};
  dsa_call_kernel(s->outcome, s->kernel, args, sizeof args / sizeof args[0]);
}

void dsa_select(struct selection *s, int64_t queries, const struct dsa_executor *executor) {
  dsa_parallel_for(executor, dsa_stage_threads(executor, selection_time(s, queries)), queries, select_task, s);
}

static void attend_task(void *arg, int64_t index) {
  struct attention *a = arg;
  int64_t m = index / a->head_tasks, h0 = index % a->head_tasks * a->heads;
  const struct tvm_any args[] = {dsa_arg_tensor(&a->q),
                                 dsa_arg_tensor(&a->kv),
                                 dsa_arg_tensor(&a->indices),
                                 dsa_arg_tensor(&a->sink),
                                 dsa_arg_tensor(&a->length),
                                 dsa_arg_tensor(&a->out),
                                 dsa_arg_tensor(&a->max_logits),
                                 dsa_arg_tensor(&a->lse),
                                 dsa_arg_int(a->m0 + m),
                                 dsa_arg_int(h0),
                                 dsa_arg_int(minimum(h0 + a->heads, a->h_q)),
                                 dsa_arg_int(a->row0 + m),
                                 dsa_arg_float(a->sm_scale),
                                 dsa_arg_int(a->has_sink),
                                 dsa_arg_int(a->has_length)};
  dsa_call_kernel(a->outcome, a->kernel, args, sizeof args / sizeof args[0]);
}

void dsa_attend(struct attention *a, int64_t queries, const struct mla_kernel *cut,
                const struct dsa_executor *executor) {
  int threads = dsa_stage_threads(executor, attention_time(a, queries));
  a->heads = cut->task_heads;
  /* For few queries, a task takes fewer heads until every thread has work: down to half a register tile, which most
   * kernels have a tile for. Fewer would take most of their time to read the keys. */
  int64_t least = cut->heads > 8 ? cut->heads / 2 : cut->heads;
  while (a->heads > least && queries * divide_up(a->h_q, a->heads) < threads)
    a->heads = divide_up(a->heads / 2, least) * least;
  a->head_tasks = divide_up(a->h_q, a->heads);
  dsa_parallel_for(executor, threads, queries * a->head_tasks, attend_task, a);
}
