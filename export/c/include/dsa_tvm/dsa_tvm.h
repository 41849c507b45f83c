/* dsa_tvm: DeepSeek Sparse Attention on CPUs and CUDA GPUs, as a C library.
 *
 * The header is C99, and the library needs neither TVM nor Python at run time. Tensors are DLPack tensors. They are
 * contiguous, at any address that their element type allows, and those of one call are all on the CPU or all on one
 * GPU. Every function checks its arguments before it computes. If it returns DSA_TVM_INVALID_ARGUMENT, the outputs are
 * untouched, and dsa_tvm_last_error() names the operator, the argument, what was expected and what was given. After
 * DSA_TVM_OUT_OF_MEMORY and DSA_TVM_INTERNAL the outputs may be partly written. All functions may be called from any
 * number of threads at a time.
 *
 * Results have the same bits for any number of threads and in any floating-point mode of the caller. The library rounds
 * to nearest and uses subnormal numbers while it computes, and then restores the mode and the flags of the caller.
 *
 * The library has threads of its own. It starts them when a call first needs them, and all callers share them. A call
 * computes on the calling thread and on those threads that begin in time. If the system gives no thread, the call
 * computes alone; short calls always do. A child made by fork starts threads of its own. A thread that has computed
 * keeps up to 1 MiB of workspace for its next call, until it ends.
 */
#ifndef DSA_TVM_H_
#define DSA_TVM_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* This number grows when something in this header changes. It stays the same when something is only added, such as a
 * field at the end of dsa_tvm_options: a program that was compiled with an older header keeps working. */
#define DSA_TVM_ABI_VERSION 1

#if defined(__GNUC__)
#define DSA_TVM_API __attribute__((visibility("default")))
#else
#define DSA_TVM_API
#endif

typedef enum dsa_tvm_status {
  DSA_TVM_OK = 0,
  DSA_TVM_INVALID_ARGUMENT = 1, /* an argument has the wrong rank, shape, type, device, layout or value */
  DSA_TVM_OUT_OF_MEMORY = 2,    /* there is no memory for the workspace; outputs may be partly written */
  DSA_TVM_UNSUPPORTED = 3,      /* the library has no kernels for this CPU, this GPU or the value of DSA_TVM_TARGET; or
                                   there is no CUDA driver */
  DSA_TVM_INTERNAL = 4          /* a kernel failed although its arguments were right; please report it; outputs may be
                                   partly written */
} dsa_tvm_status;

/* DLPack's DLDataTypeCode values for the element types of this library. */
enum {
  DSA_TVM_INT = 0,           /* int32: bits 32; int8: bits 8 */
  DSA_TVM_UINT = 1,          /* uint8: bits 8 */
  DSA_TVM_FLOAT = 2,         /* float32: bits 32; float16: bits 16 */
  DSA_TVM_BFLOAT = 4,        /* bfloat16: bits 16 */
  DSA_TVM_FLOAT8_E4M3FN = 10 /* float8_e4m3fn: bits 8 */
};

/* A tensor. It has the layout of DLPack's DLTensor, so a pointer to a DLTensor can be cast to it. If dlpack.h is
 * included first, it is DLTensor itself. */
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

/* How a call runs. A NULL pointer stands for the defaults. The fields after num_threads are for calls on a GPU. Such a
 * call is enqueued on the stream, and then the function returns. It runs in the context of the calling thread if that
 * context is on the GPU, otherwise in the primary context of the GPU. Only the first call for a GPU allocates memory,
 * because it loads the kernels. Every call can be captured in a CUDA graph, the first one too, but not the first call
 * in a second context of the same GPU. */
typedef struct dsa_tvm_options {
  uint32_t size;           /* sizeof(dsa_tvm_options), so that fields can be added */
  int32_t num_threads;     /* the most threads; 0: the process default, see dsa_tvm_set_num_threads */
  void *stream;            /* a CUstream or cudaStream_t; NULL: the default stream */
  void *workspace;         /* GPU memory at a multiple of 256 that nothing else uses until the call has run */
  uint64_t workspace_size; /* its bytes: at least what dsa_tvm_workspace_size or dsa_tvm_prepare tells */
} dsa_tvm_options;

/* The DSA_TVM_ABI_VERSION that the library was built with. */
DSA_TVM_API int32_t dsa_tvm_abi_version(void);

/* The version of the package, such as "0.1.0". */
DSA_TVM_API const char *dsa_tvm_version(void);

/* The target whose kernels are in use, such as "x86-64-v3". It is chosen once, by CPUID or by the environment variable
 * DSA_TVM_TARGET. NULL, with an error set, if there are no kernels for this CPU. */
DSA_TVM_API const char *dsa_tvm_target(void);

/* The GPU architectures that the library has kernels for, such as "sm_80,sm_90,compute_80". The last one stands for all
 * later architectures. NULL, with an error set, if the library was built without CUDA. Valid until the next call of the
 * calling thread. */
DSA_TVM_API const char *dsa_tvm_cuda_archs(void);

/* The error of the last call of the calling thread that failed; "" if none has. Valid until its next call. */
DSA_TVM_API const char *dsa_tvm_last_error(void);

/* The most threads that a call uses by default, including the calling thread. 0 (the initial value) stands for the
 * value that OMP_NUM_THREADS had when the library was loaded. Without that variable it stands for the CPUs of the
 * process: those of its affinity mask, or of the CPU quota of its cgroup if these are fewer. Setting 0 counts them
 * again. Larger numbers than 1024 or OMP_THREAD_LIMIT are reduced to these limits. */
DSA_TVM_API void dsa_tvm_set_num_threads(int32_t num_threads);
DSA_TVM_API int32_t dsa_tvm_get_num_threads(void);

/* logits[m, n] = k_scale[n] * sum_h weights[m, h] * relu(q[m, h] . k[n]) for ks[m] <= n < ke[m], else -inf.
 *   q        [s_q, h_idx, d_idx]  float32, bfloat16, float16, float8_e4m3fn or int8
 *   k        [s_kv, d_idx]        type of q, or float8_e4m3fn unless q is int8
 *   weights  [s_q, h_idx]         float32
 *   ks, ke   [s_q]                int32
 *   k_scale  [s_kv]               float32, or NULL
 *   logits   [s_q, s_kv]          float32, written
 * On x86-64-v4-bf16, x86-64-v4-amx and aarch64-bf16 (see dsa_tvm_target), subnormal bfloat16 numbers count as 0: those
 * below 2**-126. */
DSA_TVM_API dsa_tvm_status dsa_tvm_lightning_indexer(const dsa_tvm_tensor *q, const dsa_tvm_tensor *k,
                                                     const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks,
                                                     const dsa_tvm_tensor *ke, const dsa_tvm_tensor *k_scale,
                                                     dsa_tvm_tensor *logits, const dsa_tvm_options *options);

/* Positions of the topk largest logits in [ks, ke) of each row. Of equal logits the lower index wins. The positions are
 * in ascending order, padded with -1 at the end. NaN is never selected, whereas torch.topk ranks it first: a token
 * whose score is broken must not displace one whose score is known.
 *   logits   [s_q, s_kv]  float32
 *   ks, ke   [s_q]        int32
 *   topk                  1..4096
 *   indices  [s_q, topk]  int32, written */
DSA_TVM_API dsa_tvm_status dsa_tvm_topk(const dsa_tvm_tensor *logits, const dsa_tvm_tensor *ks,
                                        const dsa_tvm_tensor *ke, int64_t topk, dsa_tvm_tensor *indices,
                                        const dsa_tvm_options *options);

/* Both of the above in one call. Only the logits of a group of queries are held at a time. On the CPU they take at most
 * 4 * min(s_q, 32 * threads) * s_kv bytes, and at most 256 MiB unless 32 queries alone take more. In ONNX Runtime,
 * `threads` is the number of CPUs of the process. On a GPU, dsa_tvm_workspace_size tells how much memory they take. */
DSA_TVM_API dsa_tvm_status dsa_tvm_indexer_topk(const dsa_tvm_tensor *q, const dsa_tvm_tensor *k,
                                                const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks,
                                                const dsa_tvm_tensor *ke, const dsa_tvm_tensor *k_scale, int64_t topk,
                                                dsa_tvm_tensor *indices, const dsa_tvm_options *options);

/* Attention of every head to the rows kv[indices[m]]. All d_qk entries of a row are the key, its first d_v the value.
 *   q            [s_q, h_q, d_qk]  float32, bfloat16 or float16
 *   kv           [s_kv, d_qk]      type of q
 *   indices      [s_q, topk]       int32; outside [0, s_kv): skipped
 *   attn_sink    [h_q]             float32, or NULL: its exponential is added to the denominator of out
 *   topk_length  [s_q]             int32, or NULL: only that many leading indices are used
 *   sm_scale                       finite; multiplies the scores. The model's own: the width that its heads have before
 *                                  absorption, (qk_nope_head_dim + qk_rope_head_dim)^-0.5, times the square of YaRN's
 *                                  mscale if it has one. d_qk^-0.5 is another model.
 *   out          [s_q, h_q, d_v]   type of q, written; 0 where no key is left
 *   max_logits   [s_q, h_q]        float32, written; -inf where no key is left
 *   lse          [s_q, h_q]        float32, written; natural logarithm, +inf where no key is left
 * On x86-64-v4-bf16, x86-64-v4-amx and aarch64-bf16 (see dsa_tvm_target), subnormal bfloat16 numbers, those below
 * 2**-126, count as 0, and what sm_scale multiplies, q . kv, has to be in the range of float32. */
DSA_TVM_API dsa_tvm_status dsa_tvm_sparse_mla(const dsa_tvm_tensor *q, const dsa_tvm_tensor *kv,
                                              const dsa_tvm_tensor *indices, const dsa_tvm_tensor *attn_sink,
                                              const dsa_tvm_tensor *topk_length, double sm_scale, int64_t d_v,
                                              dsa_tvm_tensor *out, dsa_tvm_tensor *max_logits, dsa_tvm_tensor *lse,
                                              const dsa_tvm_options *options);

/* sparse_mla over rows that are stored as bytes: d_v float8_e4m3fn, then d_v / 128 little-endian float32 that each
 * scale 128 of these, then d_qk - d_v bfloat16 that are part of the key only. fp8 times scale is rounded to bfloat16.
 *   q            [s_q, h_q, d_qk]   bfloat16
 *   kv           [s_kv, d_packed]   uint8, d_packed = d_v + d_v / 32 + 2 * (d_qk - d_v): 656 for 576 and 512
 *   indices      [s_q, topk]        int32; outside [0, s_kv): skipped
 *   attn_sink    [h_q]              float32, or NULL
 *   topk_length  [s_q]              int32, or NULL
 *   sm_scale                        as for sparse_mla
 *   d_v                             a multiple of 128
 *   out          [s_q, h_q, d_v]    bfloat16, written
 *   max_logits   [s_q, h_q]         float32, written
 *   lse          [s_q, h_q]         float32, written */
DSA_TVM_API dsa_tvm_status dsa_tvm_sparse_mla_fp8(const dsa_tvm_tensor *q, const dsa_tvm_tensor *kv,
                                                  const dsa_tvm_tensor *indices, const dsa_tvm_tensor *attn_sink,
                                                  const dsa_tvm_tensor *topk_length, double sm_scale, int64_t d_v,
                                                  dsa_tvm_tensor *out, dsa_tvm_tensor *max_logits,
                                                  dsa_tvm_tensor *lse, const dsa_tvm_options *options);

/* indexer_topk, then sparse_mla over its indices.
 *   index_q        [s_q, h_idx, d_idx]  float32, bfloat16 or float16
 *   index_k        [s_kv, d_idx]        type of index_q, or float8_e4m3fn
 *   weights        [s_q, h_idx]         float32
 *   ks, ke         [s_q]                int32
 *   q              [s_q, h_q, d_qk]     type of index_q
 *   kv             [s_kv, d_qk]         type of index_q
 *   index_k_scale  [s_kv]               float32, or NULL
 *   attn_sink      [h_q]                float32, or NULL
 *   topk                                1..4096
 *   sm_scale                            as for sparse_mla
 *   out            [s_q, h_q, d_v]      type of q, written
 *   lse            [s_q, h_q]           float32, written */
DSA_TVM_API dsa_tvm_status dsa_tvm_dsa_attention(const dsa_tvm_tensor *index_q, const dsa_tvm_tensor *index_k,
                                                 const dsa_tvm_tensor *weights, const dsa_tvm_tensor *ks,
                                                 const dsa_tvm_tensor *ke, const dsa_tvm_tensor *q,
                                                 const dsa_tvm_tensor *kv, const dsa_tvm_tensor *index_k_scale,
                                                 const dsa_tvm_tensor *attn_sink, int64_t topk, double sm_scale,
                                                 int64_t d_v, dsa_tvm_tensor *out, dsa_tvm_tensor *lse,
                                                 const dsa_tvm_options *options);

/* Writes new rows into a cache of fixed capacity: out[b, positions[b, i]] = rows[b, i]; elsewhere out equals the cache.
 * The operators above learn the length in use from ke or from the indices, and read nothing after it.
 *   cache      [batch, capacity, d_row]  float32, bfloat16, float16, float8_e4m3fn, int8 or uint8
 *   rows       [batch, s_new, d_row]     type of cache
 *   positions  [batch, s_new]            int32; outside [0, capacity): skipped; of equal ones the last one wins
 *   out        [batch, capacity, d_row]  type of cache, written. If it is the cache itself, only the rows are written;
 *                                        otherwise it must not overlap an input */
DSA_TVM_API dsa_tvm_status dsa_tvm_write_rows(const dsa_tvm_tensor *cache, const dsa_tvm_tensor *rows,
                                              const dsa_tvm_tensor *positions, dsa_tvm_tensor *out,
                                              const dsa_tvm_options *options);

/* An attribute of dsa_tvm_call: an integer or a floating-point number. */
typedef union dsa_tvm_attr {
  int64_t i;
  double f;
} dsa_tvm_attr;

/* Calls any operator by name, for bindings. Inputs, attributes and outputs are in the order of the functions above. An
 * optional input may be NULL. The counts must be those of the operator. */
DSA_TVM_API dsa_tvm_status dsa_tvm_call(const char *op, const dsa_tvm_tensor *const *inputs, int32_t num_inputs,
                                        const dsa_tvm_attr *attrs, int32_t num_attrs, dsa_tvm_tensor *const *outputs,
                                        int32_t num_outputs, const dsa_tvm_options *options);

/* Checks the inputs and attributes of such a call, and writes the shapes that its outputs must have to
 * shapes[num_outputs][3]; unused lengths are 0. Nothing is computed. */
DSA_TVM_API dsa_tvm_status dsa_tvm_output_shapes(const char *op, const dsa_tvm_tensor *const *inputs,
                                                 int32_t num_inputs, const dsa_tvm_attr *attrs, int32_t num_attrs,
                                                 int64_t (*shapes)[3], int32_t num_outputs);

/* Checks them too, and tells how many bytes of workspace the call must have: 0 on the CPU. */
DSA_TVM_API dsa_tvm_status dsa_tvm_workspace_size(const char *op, const dsa_tvm_tensor *const *inputs,
                                                  int32_t num_inputs, const dsa_tvm_attr *attrs, int32_t num_attrs,
                                                  uint64_t *bytes);

/* A call in two steps, for callers that allocate its outputs and its workspace. dsa_tvm_prepare checks inputs and
 * attributes, and writes the shapes of the outputs, as dsa_tvm_output_shapes does, and the bytes of workspace: 0 on the
 * CPU, and on a GPU those for tensors at these very addresses. dsa_tvm_run checks the outputs and computes. The inputs
 * are not checked again.
 *
 * A plan holds one call: preparing it again replaces the call, and a failure leaves it empty. It refers to the data and
 * the shapes of the inputs, which must stay where they are until it has run for the last time. It may run any number of
 * times, also in several threads at a time, but not while it is being prepared. dsa_tvm_plan_create returns NULL, with an
 * error set, if there is no memory. */
typedef struct dsa_tvm_plan dsa_tvm_plan;
DSA_TVM_API dsa_tvm_plan *dsa_tvm_plan_create(void);
DSA_TVM_API void dsa_tvm_plan_destroy(dsa_tvm_plan *plan);
DSA_TVM_API dsa_tvm_status dsa_tvm_prepare(dsa_tvm_plan *plan, const char *op, const dsa_tvm_tensor *const *inputs,
                                           int32_t num_inputs, const dsa_tvm_attr *attrs, int32_t num_attrs,
                                           int64_t (*shapes)[3], int32_t num_outputs, uint64_t *workspace_size);
DSA_TVM_API dsa_tvm_status dsa_tvm_run(const dsa_tvm_plan *plan, dsa_tvm_tensor *const *outputs, int32_t num_outputs,
                                       const dsa_tvm_options *options);

/* What this machine can do at most, to compare the time of a call with: operations per second of multiply-adds of
 * "float32", of dot products of "bfloat16" or of "int8" (a product and its addition are two), in registers, with the
 * instructions of dsa_tvm_target(). It takes `seconds` and returns the best that `num_threads` threads (0: the process
 * default) reached meanwhile. DSA_TVM_UNSUPPORTED: the target has no dot products of this type, and its kernels widen it
 * to float32. */
DSA_TVM_API dsa_tvm_status dsa_tvm_peak(const char *dtype, int32_t num_threads, double seconds, double *rate);

/* Bytes per second of reading so many bytes again and again, each thread its part: from whatever cache holds them. */
DSA_TVM_API dsa_tvm_status dsa_tvm_read_rate(int64_t bytes, int32_t num_threads, double seconds, double *rate);

#ifdef __cplusplus
}
#endif
#endif /* DSA_TVM_H_ */
