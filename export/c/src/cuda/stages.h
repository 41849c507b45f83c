/* The stages that make up the operators on a GPU. Each takes what it needs from the workspace, and then launches its
 * kernels, unless the call is only being measured. */
#ifndef DSA_TVM_CUDA_STAGES_H_
#define DSA_TVM_CUDA_STAGES_H_

#include "cuda/kernels.h"

/* Scoring: queries [m0, m1). The logits of query m0 go to the address `logits`. */
struct cuda_scoring {
  const void *q, *k, *weights, *ks, *ke, *k_scale;
  void *logits;
  int64_t m0, m1, s_kv, h_idx;
  int scaled;
  int only_visible; /* nobody reads a logit outside [ks, ke) */
};
dsa_tvm_status dsa_cuda_score(struct cuda_call *c, const struct cuda_scoring *s);

/* Selection of rows. All pointers are to the first row. */
struct cuda_selection {
  const void *logits, *ks, *ke;
  void *indices;
  int64_t rows, s_kv, topk;
};
dsa_tvm_status dsa_cuda_select(struct cuda_call *c, const struct cuda_selection *s);

/* Attention of queries. All pointers are to the first query and what belongs to it. */
struct cuda_attention {
  const void *q, *kv, *indices, *sink, *length;
  void *out, *max_logits, *lse;
  int64_t rows, s_kv, h_q, topk;
  float sm_scale;
  int has_sink, has_length, packed;
};
dsa_tvm_status dsa_cuda_attend(struct cuda_call *c, const struct cuda_attention *a);

/* Writes new rows into a cache, which is copied first unless `out` is the cache itself. */
struct cuda_writing {
  const void *cache, *rows, *positions;
  void *out;
  int64_t batch, capacity, s_new, row_bytes;
};
dsa_tvm_status dsa_cuda_write_rows(struct cuda_call *c, const struct cuda_writing *w);

#endif
