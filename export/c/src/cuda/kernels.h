/* CUDA kernels in the library, and how a call on a GPU launches them. */
#ifndef DSA_TVM_CUDA_H_
#define DSA_TVM_CUDA_H_

#include "cuda/abi.h"
#include "common/internal.h"

/* A kernel as every set has it. A stage of an operator has one for each choice of element types and of the lengths that
 * its code is made for; what a kernel leaves open is -1. */
enum { MAX_SIZES = 3 };
struct cuda_kernel {
  const char *name;
  int image;
  int aligned; /* takes tensors at multiples of 16 bytes only */
  int8_t types[MAX_TYPE_VARS];
  struct {
    int dim;
    int64_t length;
    int at_most; /* otherwise that length */
  } sizes[MAX_SIZES];
};

/* What the launching code must know of each operator's decisions. */
struct cuda_lightning_indexer {
  int block_keys, queries;
  int key_bytes, group, group_bytes; /* shared memory: of the keys, and of each group of so many heads */
  int heads, box_queries, span;      /* of tensor maps: heads and queries of a box, bytes of its rows */
};
struct cuda_topk {
  int list_factor, list_min, list_max, selector_bytes;
};
struct cuda_sparse_mla {
  int heads, block_keys;
  int split_keys, stats; /* the fewest keys of a part, and the numbers that it leaves for each head beside its sums */
};

struct cuda_write_rows {
  int copy_bytes, rows; /* of a block */
};

struct cuda_shape {
  int threads;      /* 0: the set lacks this kernel */
  int shared_bytes; /* the most that a launch takes */
  union {
    struct cuda_lightning_indexer lightning_indexer;
    struct cuda_topk topk;
    struct cuda_sparse_mla sparse_mla, sparse_mla_fp8;
    struct cuda_write_rows write_rows;
  } of;
};

struct cuda_arch {
  int number; /* 90 for sm_90 and sm_90a */
  int exact;  /* sm_90a: its code runs on no later one */
};

/* The kernels for some architectures, made with the same decisions. An image is the fatbin of one operator. */
struct cuda_set {
  const struct cuda_arch *archs; /* those that it has machine code for, and one with number 0 behind */
  int ptx;          /* from which on the driver can compile it itself; 0: it cannot */
  const char *const *images;
  const struct cuda_shape *shapes; /* by kernel */
};

/* Generated. */
extern const struct cuda_kernel dsa_cuda_kernels[];
extern const struct cuda_set dsa_cuda_sets[];
extern const int dsa_num_cuda_kernels, dsa_num_cuda_sets;
extern const int dsa_cuda_toolkit; /* whose nvcc made them, 13000 for 13.0 */
extern const int dsa_cuda_tegra[];  /* compute capabilities, and 0 behind: see dsa_tvm/gpu/architectures.py */
extern const int dsa_cuda_system_shared; /* bytes that the system takes of a multiprocessor's shared memory for a block */

enum { MAX_DEVICES = 64 };
struct cuda_device {
  int multiprocessors, capability; /* 90 for 9.0 */
  int shared_bytes;                /* the most that a block may have; a multiprocessor has dsa_cuda_system_shared more */
  const struct cuda_set *set;
};

/* A contiguous array at a multiple of 16 bytes, innermost length first, as bulk copies take it: boxes of it are copied to
 * shared memory, rows of 32, 64 or 128 bytes swizzled. */
struct cuda_boxes {
  const void *data;
  int element_bytes, rank; /* 1 or 2; 2 or 3 */
  int64_t lengths[3];
  int box[3];
};
struct cuda_encoded {
  struct cuda_boxes boxes;
  struct cuda_tensor_map map;
};

/* A call while it is enqueued. */
struct cuda_call {
  const struct dsa_call *call;
  const struct cuda_device *device;
  void *stream;
  char *workspace;
  uint64_t used, peak; /* bytes of the workspace: taken now, and at most */
  int measuring;       /* only the peak is asked for */
  int aligned;         /* all inputs of bytes, and of the types that a call may choose, are at multiples of 16 bytes */
  int pushed;
  struct cuda_encoded queries, keys; /* the latest tensor maps: groups of queries share them */
};

/* kernels.c: makes a context of the call's device current: the caller's, where it has one on that device, else the primary
 * one. The first call for a device loads the kernels, the only time that anything is allocated. Every success is
 * followed by dsa_cuda_end. */
dsa_tvm_status dsa_cuda_begin(struct cuda_call *call);
void dsa_cuda_end(struct cuda_call *call);

/* kernels.c: of `count` kernels from `first` on, the first for the call's element types and lengths: its shape, NULL where
 * there is none; and its launch. `args` are the addresses of the kernel's arguments in their order. A
 * grid without blocks is nothing to do. The generated functions of cuda_launch.h, dsa_shape_<op>_<stage> and
 * dsa_launch_<op>_<stage>, call these. */
enum { MOST_SHARED = -1 }; /* for dynamic_bytes: what the kernel's shape says */
dsa_tvm_status dsa_cuda_unserved(const struct cuda_call *call); /* the error for that */
/* How many blocks of a kernel with so much shared memory a multiprocessor has at a time. */
int dsa_cuda_resident(const struct cuda_call *call, const struct cuda_shape *shape, int64_t shared_bytes);
const struct cuda_shape *dsa_cuda_shape(const struct cuda_call *call, int first, int count);
dsa_tvm_status dsa_cuda_launch(const struct cuda_call *call, int first, int count, int64_t grid_x, int64_t grid_y,
                               int64_t dynamic_bytes, void **args);

/* kernels.c: makes `known` the tensor map of `boxes`, if it is not yet. */
dsa_tvm_status dsa_cuda_tensor_map(const struct cuda_call *call, const struct cuda_boxes *boxes,
                                   struct cuda_encoded *known);

#endif
