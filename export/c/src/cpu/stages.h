/* The three stages that the operators are made of. Each is cut into tasks for the compiled kernels. */
#ifndef DSA_TVM_STAGES_H_
#define DSA_TVM_STAGES_H_

#include "common/internal.h"

/* Queries next to each other, and the keys that some of them see; the rest of the keys is nobody's. */
struct visible {
  int64_t m0, m1, n0, n1;
  int64_t first_task;
};
/* The threads that a stage of so much work takes, on an executor that allows more. Short work takes one: to have others
 * begin, and to wait for what they have begun, takes longer than it saves, and much longer where CPUs are busy. */
int dsa_stage_threads(const struct dsa_executor *executor, int64_t nanoseconds);

/* Scoring: queries [m0, m1) against all keys, written to the rows of `logits` from row 0 on. */
struct scoring {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor q, k, weights, ks, ke, k_scale, logits;
  int64_t m0, m1, rows, keys, key_tasks, s_kv;
  int scaled;
  /* Where nobody reads a logit outside [ks, ke): room for one of each query. NULL: all logits are written. */
  struct visible *visible;
  int64_t num_visible;
};
void dsa_score(struct scoring *s, const struct indexer_kernel *cut, const struct dsa_executor *executor);

/* Selection: queries [m0, m1), whose logits stand from row 0 on, into the rows of `indices` from out0 on. */
struct selection {
  struct dsa_outcome *outcome;
  dsa_kernel kernel;
  dsa_tvm_tensor logits, ks, ke, indices;
  int64_t m0, out0;
};
void dsa_select(struct selection *s, int64_t queries, const struct dsa_executor *executor);

/* Attention: queries [m0, ...), whose indices and maxima stand in the rows from row0 on. */
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
