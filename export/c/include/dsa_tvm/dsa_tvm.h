/* dsa_tvm: DeepSeek Sparse Attention on CPUs and CUDA GPUs, as a C library.
 *
 * C99. Needs nothing else at run time: no TVM, no Python. Tensors are DLPack tensors: contiguous, at any address their
 * element type allows, all of a call on the CPU or all on one GPU. Every function checks its arguments before it
 * computes: where it returns DSA_TVM_INVALID_ARGUMENT, the outputs are untouched and dsa_tvm_last_error() says which
 * argument of which operator was expected to be what. After DSA_TVM_OUT_OF_MEMORY and DSA_TVM_INTERNAL the outputs may be
 * partly written. All functions may be called from any number of threads at once.
 *
 * Results are the same bits for any number of threads, and in any floating-point mode of the caller: everything is
 * computed in round-to-nearest with denormal numbers, and the caller's mode and flags are put back.
 *
 * The library has threads of its own, which it starts when a call first needs them and which all callers share. A call
 * computes on the calling thread and on those that come in time. Where the system gives no thread it computes alone, and
 * short calls always do. A child made by fork starts threads of its own. A thread that has computed keeps up to 1 MiB of
 * workspace for the next call until it ends.
 */
#ifndef DSA_TVM_H_
#define DSA_TVM_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Grows when something that is here changes. What is added, such as fields behind the others of dsa_tvm_options, leaves
 * it as it is: a program compiled with an older header keeps working. */
#define DSA_TVM_ABI_VERSION 1

#if defined(__GNUC__)
#define DSA_TVM_API __attribute__((visibility("default")))
#else
#define DSA_TVM_API
#endif

typedef enum dsa_tvm_status {
  DSA_TVM_OK = 0,
  DSA_TVM_INVALID_ARGUMENT = 1, /* an argument has the wrong rank, shape, type, device, layout or value */
  DSA_TVM_OUT_OF_MEMORY = 2,    /* no memory for the workspace; outputs may be partly written */
  DSA_TVM_UNSUPPORTED = 3,      /* this CPU, this GPU or the value of DSA_TVM_TARGET has no kernels in this library; or
                                   there is no CUDA driver */
  DSA_TVM_INTERNAL = 4          /* a kernel failed although its arguments were right: please report it; outputs may be
                                   partly written */
} dsa_tvm_status;

/* DLPack's DLDataTypeCode values of the element types that are used here. */
enum {
  DSA_TVM_INT = 0,           /* int32: bits 32; int8: bits 8 */
  DSA_TVM_UINT = 1,          /* uint8: bits 8 */
  DSA_TVM_FLOAT = 2,         /* float32: bits 32; float16: bits 16 */
  DSA_TVM_BFLOAT = 4,        /* bfloat16: bits 16 */
  DSA_TVM_FLOAT8_E4M3FN = 10 /* float8_e4m3fn: bits 8 */
};

/* A tensor: the same layout as DLPack's DLTensor, so that a DLTensor pointer can be cast to it. With dlpack.h included
 * first it is DLTensor itself. */
#ifdef DLPACK_DLPACK_H_
typedef DLTensor dsa_tvm_tensor;
#else
typedef struct dsa_tvm_tensor {
  void *data;
  struct {
    int32_t device_type; /* 1: CPU; 2: CUDA GPU */
    int32_t device_id;   /* number of the GPU */
  } device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes; /* 1 */
  } dtype;
  int64_t *shape;
  int64_t *strides; /* in elements; NULL: contiguous */
  uint64_t byte_offset;
} dsa_tvm_tensor;
#endif

/* How a call runs. A NULL pointer to it means the defaults. The fields behind num_threads are for calls on a GPU. Such
 * a call is enqueued on the stream and returns. It runs in the calling thread's context, if that is one of the GPU,
 * else in the GPU's primary one. Only the first call for a GPU allocates, for it loads the kernels: all others, and the
 * first one too, can be captured in a CUDA graph, except the first one in a second context of that GPU. */
typedef struct dsa_tvm_options {
  uint32_t size;           /* sizeof(dsa_tvm_options), so that fields can be added */
  int32_t num_threads;     /* at most so many; 0: the process default, see dsa_tvm_set_num_threads */
  void *stream;            /* a CUstream or cudaStream_t; NULL: the default stream */
  void *workspace;         /* memory of the GPU, at a multiple of 256, that is the call's own until it has run */
  uint64_t workspace_size; /* at least what dsa_tvm_workspace_size tells */
} dsa_tvm_options;

/* DSA_TVM_ABI_VERSION of the library that is loaded. */
DSA_TVM_API int32_t dsa_tvm_abi_version(void);

/* Version of the package, such as "0.1.0". */
DSA_TVM_API const char *dsa_tvm_version(void);

/* The kernels in use, such as "x86-64-v3"; chosen once, by CPUID or by the environment variable DSA_TVM_TARGET.
 * NULL, with an error set, where there are none for this CPU. */
DSA_TVM_API const char *dsa_tvm_target(void);

/* The GPU architectures the library has kernels for, such as "sm_80,sm_90,compute_80", of which the last stands for any
 * later one. NULL, with an error set, where it was built without. Valid until the calling thread's next call. */
DSA_TVM_API const char *dsa_tvm_cuda_archs(void);

/* What went wrong in the calling thread's last failed call; "" when nothing has. Valid until its next call. */
DSA_TVM_API const char *dsa_tvm_last_error(void);

/* The most threads that a call uses by default, the calling one included. 0 (the start value) stands for
 * OMP_NUM_THREADS as it was when the library was loaded; without it, for the CPUs of the process: those of its affinity
 * mask, or of the CPU quota of its cgroup where that is less. Setting 0 looks at them again. More than 1024, or than
 * OMP_THREAD_LIMIT, count as that. */
DSA_TVM_API void dsa_tvm_set_num_threads(int32_t num_threads);
DSA_TVM_API int32_t dsa_tvm_get_num_threads(void);

/* logits[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n]) for ks[m] <= n < ke[m], else -inf.
 *   q        [s_q, h_idx, d_idx]  float32, bfloat16, float16, float8_e4m3fn or int8
 *   k        [s_kv, d_idx]        type of q, or float8_e4m3fn where that is no int8
 *   weights  [s_q, h_idx]         float32
 *   ks, ke   [s_q]                int32
 *   k_scale  [s_kv]               float32, or NULL
 *   logits   [s_q, s_kv]          float32, written
 * On x86-64-v4-bf16 (see dsa_tvm_target), subnormal bfloat16 numbers, those below 2**-126, count as 0. */
DSA_TVM_API dsa_tvm_status dsa_tvm_lightning_indexer(const dsa_tvm_tensor *q, const dsa_tvm_tensor *k,
                                                     const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks,
                                                     const dsa_tvm_tensor *ke, const dsa_tvm_tensor *k_scale,
                                                     dsa_tvm_tensor *logits, const dsa_tvm_options *options);

/* Positions of the topk largest logits in [ks, ke) of each row: larger first, equal ones by lower index; ascending, -1
 * behind. NaN is never selected, where torch.topk ranks it first: a token whose score is broken must not displace one
 * whose score is known.
 *   logits   [s_q, s_kv]  float32
 *   ks, ke   [s_q]        int32
 *   topk                  1..4096
 *   indices  [s_q, topk]  int32, written */
DSA_TVM_API dsa_tvm_status dsa_tvm_topk(const dsa_tvm_tensor *logits, const dsa_tvm_tensor *ks,
                                        const dsa_tvm_tensor *ke, int64_t topk, dsa_tvm_tensor *indices,
                                        const dsa_tvm_options *options);

/* Both of the above; only the logits of a group of queries are held at a time. On the CPU these are at most
 * 4 * min(s_q, 32 * threads) * s_kv bytes, and no more than 256 MiB where 32 queries take less than that. In ONNX Runtime
 * `threads` are the CPUs of the process. On a GPU dsa_tvm_workspace_size tells. */
DSA_TVM_API dsa_tvm_status dsa_tvm_indexer_topk(const dsa_tvm_tensor *q, const dsa_tvm_tensor *k,
                                                const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks,
                                                const dsa_tvm_tensor *ke, const dsa_tvm_tensor *k_scale, int64_t topk,
                                                dsa_tvm_tensor *indices, const dsa_tvm_options *options);

/* Attention of every head to the rows kv[indices[m]]; key: all d_qk entries of a row, value: its first d_v.
 *   q            [s_q, h_q, d_qk]  float32, bfloat16 or float16
 *   kv           [s_kv, d_qk]      type of q
 *   indices      [s_q, topk]       int32; outside [0, s_kv): skipped
 *   attn_sink    [h_q]             float32, or NULL: its exponential joins the denominator of out
 *   topk_length  [s_q]             int32, or NULL: only that many leading indices are used
 *   sm_scale                       finite; multiplies the scores. The model's own: the width that its heads have before
 *                                  absorption, (qk_nope_head_dim + qk_rope_head_dim)^-0.5, times the square of YaRN's
 *                                  mscale if it has one. d_qk^-0.5 is another model.
 *   out          [s_q, h_q, d_v]   type of q, written; 0 where no key is left
 *   max_logits   [s_q, h_q]        float32, written; -inf where no key is left
 *   lse          [s_q, h_q]        float32, written; natural logarithm, +inf where no key is left
 * On x86-64-v4-bf16 (see dsa_tvm_target), subnormal bfloat16 numbers, those below 2**-126, count as 0, and what sm_scale
 * multiplies, q . kv, has to be in the range of float32. */
DSA_TVM_API dsa_tvm_status dsa_tvm_sparse_mla(const dsa_tvm_tensor *q, const dsa_tvm_tensor *kv,
                                              const dsa_tvm_tensor *indices, const dsa_tvm_tensor *attn_sink,
                                              const dsa_tvm_tensor *topk_length, double sm_scale, int64_t d_v,
                                              dsa_tvm_tensor *out, dsa_tvm_tensor *max_logits, dsa_tvm_tensor *lse,
                                              const dsa_tvm_options *options);

/* sparse_mla over rows that are kept in bytes: d_v float8_e4m3fn, d_v / 128 little-endian float32 that scale 128 of them
 * each, and d_qk - d_v bfloat16 that are key only. What the first ones stand for is rounded to bfloat16.
 *   q            [s_q, h_q, d_qk]   bfloat16
 *   kv           [s_kv, d_packed]   uint8, d_packed = d_v + d_v / 32 + 2 * (d_qk - d_v): 656 for 576 and 512
 *   d_v                             a multiple of 128
 *   out          [s_q, h_q, d_v]    bfloat16, written
 * The others as there. */
DSA_TVM_API dsa_tvm_status dsa_tvm_sparse_mla_fp8(const dsa_tvm_tensor *q, const dsa_tvm_tensor *kv,
                                                  const dsa_tvm_tensor *indices, const dsa_tvm_tensor *attn_sink,
                                                  const dsa_tvm_tensor *topk_length, double sm_scale, int64_t d_v,
                                                  dsa_tvm_tensor *out, dsa_tvm_tensor *max_logits,
                                                  dsa_tvm_tensor *lse, const dsa_tvm_options *options);

/* indexer_topk, then sparse_mla over its indices. Arguments as there. */
DSA_TVM_API dsa_tvm_status dsa_tvm_dsa_attention(const dsa_tvm_tensor *index_q, const dsa_tvm_tensor *index_k,
                                                 const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks,
                                                 const dsa_tvm_tensor *ke, const dsa_tvm_tensor *q,
                                                 const dsa_tvm_tensor *kv, const dsa_tvm_tensor *index_k_scale,
                                                 const dsa_tvm_tensor *attn_sink, int64_t topk, double sm_scale,
                                                 int64_t d_v, dsa_tvm_tensor *out, dsa_tvm_tensor *lse,
                                                 const dsa_tvm_options *options);

/* New rows of a cache of fixed capacity: out[b, positions[b, i]] = rows[b, i], elsewhere out is the cache. The operators
 * above take the length in use as ke, or by the indices, and read nothing behind it.
 *   cache      [batch, capacity, d_row]  float32, bfloat16, float16, float8_e4m3fn, int8 or uint8
 *   rows       [batch, s_new, d_row]     type of cache
 *   positions  [batch, s_new]            int32; outside [0, capacity): skipped; of equal ones the last one wins
 *   out        [batch, capacity, d_row]  type of cache, written; at the address of the cache only the rows are, and
 *                                        anywhere else it must not overlap an input */
DSA_TVM_API dsa_tvm_status dsa_tvm_write_rows(const dsa_tvm_tensor *cache, const dsa_tvm_tensor *rows,
                                              const dsa_tvm_tensor *positions, dsa_tvm_tensor *out,
                                              const dsa_tvm_options *options);

/* An attribute of dsa_tvm_call: an integer or a real number, as the operator has it. */
typedef union dsa_tvm_attr {
  int64_t i;
  double f;
} dsa_tvm_attr;

/* Any operator by name, for bindings: inputs, attributes and outputs in the order of the functions above, NULL for an
 * optional input that is left out. The counts must be the operator's own. */
DSA_TVM_API dsa_tvm_status dsa_tvm_call(const char *op, const dsa_tvm_tensor *const *inputs, int32_t num_inputs,
                                        const dsa_tvm_attr *attrs, int32_t num_attrs, dsa_tvm_tensor *const *outputs,
                                        int32_t num_outputs, const dsa_tvm_options *options);

/* Checks the inputs and attributes of such a call and tells the shapes its outputs must have, unused lengths 0:
 * shapes[num_outputs][3]. Nothing is computed. */
DSA_TVM_API dsa_tvm_status dsa_tvm_output_shapes(const char *op, const dsa_tvm_tensor *const *inputs,
                                                 int32_t num_inputs, const dsa_tvm_attr *attrs, int32_t num_attrs,
                                                 int64_t (*shapes)[3], int32_t num_outputs);

/* Checks likewise and tells the bytes of workspace that the call must have: 0 on the CPU. */
DSA_TVM_API dsa_tvm_status dsa_tvm_workspace_size(const char *op, const dsa_tvm_tensor *const *inputs,
                                                  int32_t num_inputs, const dsa_tvm_attr *attrs, int32_t num_attrs,
                                                  uint64_t *bytes);

#ifdef __cplusplus
}
#endif
#endif /* DSA_TVM_H_ */
