/* The CUDA kernels of the library, and the state of a call on a GPU. */
#ifndef DSA_TVM_CUDA_H_
#define DSA_TVM_CUDA_H_

#include "cuda/abi.h"
#include "common/internal.h"

/* A kernel, which all sets have. A stage of an operator has one for each choice of element types and of the lengths
 * that are constants in its code. -1 stands for what the kernel leaves open. */
enum { MAX_SIZES = 3 };
struct cuda_kernel {
  const char *name;
  int image;
  int aligned; /* it needs tensors at multiples of 16 bytes */
  int8_t types[MAX_TYPE_VARS];
  struct {
    int dim;
    int64_t length;
    int at_most; /* whether smaller lengths are served too */
  } sizes[MAX_SIZES];
};

/* The decisions of each operator that a launch depends on. */
struct cuda_lightning_indexer {
  int block_keys, queries;
  int key_bytes, group, group_bytes; /* shared memory for keys, and for each group of `group` heads */
  int heads, box_queries, span;      /* for tensor maps: heads and queries of a box, and bytes of its rows */
};
struct cuda_topk {
  int list_factor, list_min, list_max, selector_bytes;
};
struct cuda_sparse_mla {
  int heads, block_keys;
  int split_keys, stats; /* the fewest keys of a part; the numbers it leaves for each head besides its sums */
};

struct cuda_write_rows {
  int copy_bytes, rows; /* for one block */
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
  int exact;  /* for sm_90a: its code runs on no later architecture */
};

/* Kernels for some architectures that have the same decisions. An image is the fatbin of one operator. */
struct cuda_set {
  const struct cuda_arch *archs; /* those with machine code; ends with the number 0 */
  int ptx; /* the first capability for which the driver can compile the PTX; 0: there is no PTX */
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
  int shared_bytes;                /* the most for a block; a multiprocessor has dsa_cuda_system_shared more */
  const struct cuda_set *set;
};

/* A contiguous array at a multiple of 16 bytes for bulk copies, with its innermost length first. Boxes of it are copied
 * to shared memory, where their rows of 32, 64 or 128 bytes are swizzled. */
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

/* A call that is being enqueued. */
struct cuda_call {
  const struct dsa_call *call;
  const struct cuda_device *device;
  void *stream;
  char *workspace;
  uint64_t used, peak; /* bytes of the workspace: in use now, and the most so far */
  int measuring;       /* only find the peak, and launch nothing */
  int aligned;         /* all inputs of bytes or of a variable type are at multiples of 16 bytes */
  int pushed;
  struct cuda_encoded queries, keys; /* the latest tensor maps, which groups of queries share */
};

/* kernels.c: dsa_cuda_find_device sets call->device, which is all that measuring needs. The first call for a device loads
 * the kernels, the only time that anything is allocated. dsa_cuda_begin does the same and makes a context of the device
 * current: the caller's, if it has one on that device, otherwise the primary one. dsa_cuda_end follows every success. */
dsa_tvm_status dsa_cuda_find_device(struct cuda_call *call);
dsa_tvm_status dsa_cuda_begin(struct cuda_call *call);
void dsa_cuda_end(struct cuda_call *call);

/* kernels.c: dsa_cuda_shape looks among `count` kernels, from `first` on, for the first that serves the call's element
 * types and lengths, and returns its shape, or NULL if there is none. dsa_cuda_launch launches the kernel of such a
 * shape, so a kernel is looked for once. `args` are the addresses of the kernel's arguments in their order. If the grid
 * has no blocks, there is nothing to do. The generated functions of cuda_launch.h call these two:
 * dsa_shape_<op>_<stage> and dsa_launch_<op>_<stage>. */
enum { MOST_SHARED = -1 }; /* for dynamic_bytes: what the kernel's shape says */
dsa_tvm_status dsa_cuda_unserved(const struct cuda_call *call); /* the error for that */
/* How many blocks of a kernel, with this much shared memory each, a multiprocessor holds at a time. */
int dsa_cuda_resident(const struct cuda_call *call, const struct cuda_shape *shape, int64_t shared_bytes);
const struct cuda_shape *dsa_cuda_shape(const struct cuda_call *call, int first, int count);
dsa_tvm_status dsa_cuda_launch(const struct cuda_call *call, const struct cuda_shape *shape, int64_t grid_x,
                               int64_t grid_y, int64_t dynamic_bytes, void **args);

/* kernels.c: makes `known` the tensor map of `boxes`, if it is not yet. */
dsa_tvm_status dsa_cuda_tensor_map(const struct cuda_call *call, const struct cuda_boxes *boxes,
                                   struct cuda_encoded *known);

#endif
