/* The three stages that make up the operators. Each is cut into tasks for the compiled kernels. */
#ifndef DSA_TVM_STAGES_H_
#define DSA_TVM_STAGES_H_

#include "common/internal.h"

/* Consecutive queries, and a range with all keys that they see. */
struct visible {
  int64_t m0, m1, n0, n1;
  int64_t first_task;
};
/* The number of threads for a stage that takes this long on one thread. Short work gets one thread: to wake others, and
 * to wait for what they have begun, takes longer than it saves, and much longer if the CPUs are busy. */
int dsa_stage_threads(const struct dsa_executor *executor, int64_t nanoseconds);

/* Scoring: queries [m0, m1) against all keys. The first query's logits go to row 0 of `logits`. */
struct scoring {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor q, k, weights, ks, ke, k_scale, logits;
  int64_t m0, m1, rows, keys, key_tasks, s_kv;
  int scaled;
  /* Room for one entry for each query, if nobody reads logits outside [ks, ke). NULL: all logits are written. */
  struct visible *visible;
  int64_t num_visible;
};
void dsa_score(struct scoring *s, const struct indexer_kernel *cut, const struct dsa_executor *executor);

/* Selection: queries [m0, ...). Their logits begin at row 0, and their indices go to `indices` from row out0 on. */
struct selection {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor logits, ks, ke, indices;
  int64_t m0, out0;
};
void dsa_select(struct selection *s, int64_t queries, const struct dsa_executor *executor);

/* Attention: queries [m0, ...). Their indices and maxima begin at row row0. */
struct attention {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor q, kv, indices, sink, length, out, max_logits, lse;
  int64_t m0, row0, heads, head_tasks, h_q;
  double sm_scale;
  int has_sink, has_length;
};
void dsa_attend(struct attention *a, int64_t queries, const struct mla_kernel *cut,
                const struct dsa_executor *executor);

#endif
