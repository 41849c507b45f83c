/* Which kernels each stage launches, with what grid, shared memory and workspace. */
#include "cuda/stages.h"

#include "cuda/workspace.h"
#include "cuda_launch.h"

/* A launch for many queries is cut into this many blocks for each multiprocessor, because blocks that see fewer keys
 * leave room for others. A launch for few queries is cut into as many blocks as fit, which all load keys at a time. */
enum { BLOCKS_PER_MULTIPROCESSOR = 8, FEWEST_TILES = 4 };

/* A cut of the rows of queries and the tiles of keys into blocks. */
struct cut {
  int64_t blocks, runs, run_tiles;
};
static struct cut cut_of(const struct cuda_scoring *s, const struct cuda_lightning_indexer *kernel, int64_t most_blocks,
                         int64_t fewest_tiles) {
  struct cut cut = {.blocks = divide_up(s->m1 - s->m0, kernel->queries)};
  int64_t tiles = divide_up(s->s_kv, kernel->block_keys);
  cut.run_tiles = divide_up(tiles, divide_up(most_blocks, cut.blocks));
  /* A block loads its queries before its first tile. */
  if (cut.run_tiles < fewest_tiles) cut.run_tiles = fewest_tiles;
  cut.runs = divide_up(tiles, cut.run_tiles);
  return cut;
}
static struct cut cut_for_many(const struct cuda_scoring *s, const struct cuda_lightning_indexer *kernel,
                               const struct cuda_device *device) {
  return cut_of(s, kernel, BLOCKS_PER_MULTIPROCESSOR * device->multiprocessors, FEWEST_TILES);
}
static struct cut cut_for_few(const struct cuda_call *c, const struct cuda_scoring *s, const struct cuda_shape *shape,
                              int64_t shared_bytes) {
  int64_t resident = minimum(dsa_cuda_resident(c, shape, shared_bytes), BLOCKS_PER_MULTIPROCESSOR);
  return cut_of(s, &shape->of.lightning_indexer, (resident ? resident : 1) * c->device->multiprocessors, 1);
}

/* Blocks with many queries read the keys fewer times. They are used if there are enough of them for the GPU, and enough
 * queries to fill half a block. A library that is made for tuning launches the stage that is tuned, on any GPU. */
static int are_few(const struct cuda_scoring *s, const struct cuda_lightning_indexer *many, int64_t processors) {
#ifdef DSA_TUNED_FOR_FEW
  return (void)s, (void)many, (void)processors, DSA_TUNED_FOR_FEW;
#endif
  int64_t queries = s->m1 - s->m0, tiles = divide_up(s->s_kv, many->block_keys);
  return 2 * queries <= many->queries ||
         divide_up(queries, many->queries) * divide_up(tiles, FEWEST_TILES) < 2 * processors;
}

/* Launches a stage of the indexer. All stages take the same arguments, except for queries and keys. */
#define SCORE(stage, shape, shared_bytes, queries, keys)                                                            \
  dsa_launch_lightning_indexer_##stage(c, shape, cut.blocks, cut.runs, shared_bytes, queries, keys, s->weights,     \
                                       s->ks, s->ke, s->k_scale, s->logits, s->s_kv, (int32_t)s->h_idx, s->m0,      \
                                       s->m1, 0, (int32_t)cut.run_tiles, s->scaled, !s->only_visible, cut.blocks,   \
                                       (int32_t)cut.runs)

#ifdef DSA_HAS_LIGHTNING_INDEXER_HOPPER_MANY
static dsa_tvm_status score_on_hopper(struct cuda_call *c, const struct cuda_scoring *s,
                                      const struct cuda_shape *shape, int few) {
  const struct cuda_lightning_indexer *kernel = &shape->of.lightning_indexer;
  int width = c->call->in[0].dtype.bits / 8, d_idx = (int)c->call->dim[DIM_D_IDX], box = kernel->span / width;
  /* The map has all queries of the call, so it serves every group of them. A block may copy queries of the next group,
   * but it does not store their logits. */
  int64_t s_q = c->call->dim[DIM_S_Q];
  struct cuda_boxes q = {s->q, width, 3, {d_idx, s->h_idx, s_q}, {box, kernel->heads, kernel->box_queries}};
  struct cuda_boxes k = {s->k, width, 2, {d_idx, s->s_kv}, {box, kernel->block_keys}};
  dsa_tvm_status status = dsa_cuda_tensor_map(c, &q, &c->queries);
  if (status == DSA_TVM_OK) status = dsa_cuda_tensor_map(c, &k, &c->keys);
  if (status != DSA_TVM_OK) return status;
  struct cut cut = few ? cut_for_few(c, s, shape, shape->shared_bytes) : cut_for_many(s, kernel, c->device);
  const struct cuda_tensor_map *q_map = &c->queries.map, *k_map = &c->keys.map;
  return few ? SCORE(hopper_few, shape, MOST_SHARED, q_map, k_map)
             : SCORE(hopper_many, shape, MOST_SHARED, q_map, k_map);
}
#endif

dsa_tvm_status dsa_cuda_score(struct cuda_call *c, const struct cuda_scoring *s) {
  int64_t processors = c->device->multiprocessors;
  const struct cuda_shape *many = dsa_shape_lightning_indexer_many(c), *few = dsa_shape_lightning_indexer_few(c);
  if (!many || !few) return dsa_cuda_unserved(c);
  if (c->measuring || s->m0 == s->m1 || !s->s_kv) return DSA_TVM_OK;
#ifdef DSA_HAS_LIGHTNING_INDEXER_HOPPER_MANY
  const struct cuda_shape *h_many = dsa_shape_lightning_indexer_hopper_many(c);
  const struct cuda_shape *h_few = dsa_shape_lightning_indexer_hopper_few(c);
  if (h_many && h_few) {
    int use_few = are_few(s, &h_many->of.lightning_indexer, processors);
    return score_on_hopper(c, s, use_few ? h_few : h_many, use_few);
  }
#endif
  int use_few = are_few(s, &many->of.lightning_indexer, processors);
  const struct cuda_lightning_indexer *kernel = &(use_few ? few : many)->of.lightning_indexer;
  int64_t shared_bytes = kernel->key_bytes + divide_up(s->h_idx, kernel->group) * kernel->group_bytes;
  struct cut cut = use_few ? cut_for_few(c, s, few, shared_bytes) : cut_for_many(s, kernel, c->device);
  return use_few ? SCORE(few, few, shared_bytes, s->q, s->k) : SCORE(many, many, shared_bytes, s->q, s->k);
}
#undef SCORE

/* With few rows, one block for each row leaves multiprocessors idle, so rows are cut into parts. The merge reads topk
 * keys of every part. So more parts pay until a part is about as long as all that the merge reads. */
enum { LONG_ROW = 16384, MOST_PARTS = 64 };
static int64_t parts_of(const struct cuda_selection *s, const struct cuda_device *device) {
  int64_t parts = 1;
  if (s->s_kv < LONG_ROW || !s->rows) return parts;
  int64_t most = minimum(device->multiprocessors / s->rows, MOST_PARTS);
  while (parts < most && (parts + 1) * (parts + 1) * s->topk <= s->s_kv) parts++;
  return parts;
}

dsa_tvm_status dsa_cuda_select(struct cuda_call *c, const struct cuda_selection *s) {
  const struct cuda_shape *shape = dsa_shape_topk_rows(c);
  if (!shape) return dsa_cuda_unserved(c);
  const struct cuda_topk *cut = &shape->of.topk;
  int64_t parts = parts_of(s, c->device);
  void *values = NULL, *positions = NULL;
  if (parts > 1) {
    uint64_t bytes = 4u * (uint64_t)(s->rows * parts * s->topk);
    values = dsa_cuda_take(c, bytes);
    positions = dsa_cuda_take(c, bytes);
  }
  if (c->measuring) return DSA_TVM_OK;
  int64_t list = minimum(cut->list_factor * s->topk, cut->list_max);
  if (list < cut->list_min) list = cut->list_min;
  int capacity = (int)(list / 4 * 4);
  int64_t shared_bytes = cut->selector_bytes + 8 * (int64_t)capacity;
  if (parts == 1)
    return dsa_launch_topk_rows(c, shape, s->rows, 1, shared_bytes, s->logits, s->ks, s->ke, NULL, NULL, s->indices,
                                s->s_kv, s->topk, capacity, s->rows, 1);
  dsa_tvm_status status =
      dsa_launch_topk_parts(c, dsa_shape_topk_parts(c), s->rows, parts, shared_bytes, s->logits, s->ks, s->ke, NULL,
                            values, positions, s->s_kv, s->topk, capacity, s->rows, parts);
  if (status != DSA_TVM_OK) return status;
  return dsa_launch_topk_merge(c, dsa_shape_topk_merge(c), s->rows, 1, shared_bytes, values, NULL, NULL, positions,
                               NULL, s->indices, parts * s->topk, s->topk, capacity, s->rows, 1);
}

/* How many keys a block takes. One block for each group of heads of each query may leave multiprocessors idle, always
 * or in the last round. Cutting the keys into parts spreads the work. A part also costs time for writing and reading
 * its sums once more, which is counted as `split_keys` keys, the fewest keys of a part. */
static int64_t part_keys_of(int64_t topk, int64_t blocks, const struct cuda_sparse_mla *cut, int64_t processors) {
  int64_t chosen = divide_up(topk, cut->block_keys) * cut->block_keys;
  int64_t least = divide_up(blocks, processors) * chosen, most = blocks ? divide_up(2 * processors, blocks) : 1;
  for (int64_t parts = 2; parts <= most; parts++) {
    int64_t keys = divide_up(divide_up(topk, parts), cut->block_keys) * cut->block_keys;
    if (keys < cut->split_keys) break;
    int64_t longest = divide_up(blocks * divide_up(topk, keys), processors) * (keys + cut->split_keys);
    if (longest < least) {
      least = longest;
      chosen = keys;
    }
  }
  return chosen;
}

/* Launches the attention, over plain rows or packed rows. */
#define ATTEND(op)                                                                                                   \
  dsa_launch_##op##_attend(c, shape, blocks, parts, MOST_SHARED, a->q, a->kv, a->indices, a->sink, a->length,        \
                           a->out, a->max_logits, a->lse, sums, stats, a->rows, a->s_kv, a->h_q, a->topk, parts,     \
                           keys, a->sm_scale, a->has_sink, a->has_length)
#define COMBINE(op)                                                                                                  \
  dsa_launch_##op##_combine(c, dsa_shape_##op##_combine(c), a->rows * a->h_q, 1, 0, sums, stats, a->sink, a->out,    \
                            a->max_logits, a->lse, a->rows * a->h_q, a->h_q, parts, a->has_sink)

dsa_tvm_status dsa_cuda_attend(struct cuda_call *c, const struct cuda_attention *a) {
  const struct cuda_shape *shape = a->packed ? dsa_shape_sparse_mla_fp8_attend(c) : dsa_shape_sparse_mla_attend(c);
  if (!shape) return dsa_cuda_unserved(c);
  const struct cuda_sparse_mla *cut = a->packed ? &shape->of.sparse_mla_fp8 : &shape->of.sparse_mla;
  int64_t blocks = a->rows * divide_up(a->h_q, cut->heads), d_v = c->call->dim[DIM_D_V];
  int64_t keys = part_keys_of(a->topk, blocks, cut, c->device->multiprocessors);
  int64_t parts = divide_up(a->topk, keys);
  void *sums = NULL, *stats = NULL;
  if (parts > 1) {
    sums = dsa_cuda_take(c, 4u * (uint64_t)(a->rows * a->h_q * parts * d_v));
    stats = dsa_cuda_take(c, 4u * (uint64_t)(a->rows * a->h_q * parts * cut->stats));
  }
  if (c->measuring) return DSA_TVM_OK;
  dsa_tvm_status status = a->packed ? ATTEND(sparse_mla_fp8) : ATTEND(sparse_mla);
  if (parts == 1 || status != DSA_TVM_OK) return status;
  return a->packed ? COMBINE(sparse_mla_fp8) : COMBINE(sparse_mla);
}
#undef ATTEND
#undef COMBINE

static int all_wide(const void *from, const void *to, int64_t bytes) {
  return ((uintptr_t)from | (uintptr_t)to | (uint64_t)bytes) % 16 == 0;
}

dsa_tvm_status dsa_cuda_write_rows(struct cuda_call *c, const struct cuda_writing *w) {
  const struct cuda_shape *copy = dsa_shape_write_rows_copy(c), *write = dsa_shape_write_rows_write(c);
  if (!copy || !write) return dsa_cuda_unserved(c);
  int64_t bytes = w->batch * w->capacity * w->row_bytes, count = w->batch * w->s_new;
  dsa_tvm_status status = DSA_TVM_OK;
  if (c->measuring || !bytes) return status;
  if (w->out != w->cache)
    status = dsa_launch_write_rows_copy(c, copy, divide_up(bytes, copy->of.write_rows.copy_bytes), 1, 0, w->cache,
                                        w->out, bytes, all_wide(w->cache, w->out, bytes));
  if (status != DSA_TVM_OK || !count) return status;
  return dsa_launch_write_rows_write(c, write, divide_up(count, write->of.write_rows.rows), 1, 0, w->rows,
                                     w->positions, w->out, count, w->s_new, w->capacity, w->row_bytes,
                                     all_wide(w->rows, w->out, w->row_bytes));
}
