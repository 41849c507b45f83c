/* Declarations that the C files share. The tables of the operators are generated from the OpSpecs (specs.inc). */
#ifndef DSA_TVM_INTERNAL_H_
#define DSA_TVM_INTERNAL_H_

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "dsa_tvm/dsa_tvm.h"

/* DLPack's numbers of the devices. */
enum { CPU_DEVICE = 1, CUDA_DEVICE = 2 };

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

/* Numbers of dimensions and element types, the most that an operator has of each thing, and the tables: generated. */
#include "specs.h"

struct dtype_spec {
  const char *name;
  uint8_t code, bits;
  uint8_t storage_code; /* the type of a kernel's buffer: an unsigned integer for bf16, f16, fp8 and int8 */
  int32_t onnx;         /* ONNX TensorProto.DataType */
};

struct dim_spec {
  const char *name;
  int64_t minimum, maximum;
  const int64_t *values; /* the only values served, or NULL */
  int num_values;
  int multiple;     /* a library can be built for multiples of this */
  int at_most;      /* the dimension this one may not exceed, or -1 */
  const char *flag; /* the option of `dsa-tvm build` that widens the served values */
  int num_parts;    /* terms of the sum that gives this length; 0: it is no sum */
  struct {
    int dim, each, adds; /* every `each` elements of that dimension add `adds`; it is a multiple of `each` */
  } parts[MAX_PARTS];
};

struct tensor_spec {
  const char *name;
  int dtype; /* >= 0: an element type; -1 - v: type variable v */
  int ndim;
  int dims[MAX_NDIM];
  int optional;
  int may_be; /* for an output: the input whose memory it may use, or -1 */
};

struct attr_spec {
  const char *name;
  int is_float;
  int dim; /* the dimension whose length it gives, or -1 */
};

struct op_spec {
  const char *name, *onnx_name;
  int num_inputs, num_outputs, num_attrs, num_variants;
  struct tensor_spec inputs[MAX_INPUTS];
  struct tensor_spec outputs[MAX_OUTPUTS];
  struct attr_spec attrs[MAX_ATTRS];
  const int8_t (*variants)[MAX_TYPE_VARS]; /* element types of the type variables */
};

extern const struct dtype_spec dsa_dtypes[NUM_DTYPES];
extern const struct dim_spec dsa_dims[NUM_DIMS];
extern const struct op_spec dsa_ops[NUM_OPS];

/* Runs task(arg, 0), ..., task(arg, count - 1), in any order, on up to `threads` threads, and waits for them. */
typedef void (*dsa_task)(void *arg, int64_t index);
struct dsa_executor {
  int threads; /* the most that a call may use */
  void (*parallel_for)(void *state, int threads, int64_t count, dsa_task task, void *arg);
  void *state;
};

/* A call whose arguments have been checked. Its tensors are contiguous, and their data includes the byte_offset. */
struct dsa_call {
  const struct op_spec *op;
  dsa_tvm_tensor in[MAX_INPUTS];
  int present[MAX_INPUTS];
  dsa_tvm_tensor out[MAX_OUTPUTS];
  dsa_tvm_attr attr[MAX_ATTRS];
  int64_t dim[NUM_DIMS];
  int8_t type[MAX_TYPE_VARS];
  int takes_cuda; /* set by the caller: tensors may be on a GPU */
  int32_t device_type, device_id;
};

/* What dsa_tvm_prepare found. */
struct dsa_tvm_plan {
  struct dsa_call call; /* without outputs; call.op is NULL if nothing is prepared */
  uint64_t workspace;   /* bytes on a GPU */
};

/* error.c: sets the text of dsa_tvm_last_error(), and returns `status`. */
dsa_tvm_status dsa_fail(dsa_tvm_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* check.c: checks every property of every argument against the spec of the operator. The caller sets call->op. First
 * come the inputs, which bind the dimensions. Then dsa_output_shape tells the shapes of the outputs, which are checked
 * last. */
dsa_tvm_status dsa_check_inputs(struct dsa_call *call, const dsa_tvm_tensor *const *inputs, const dsa_tvm_attr *attrs);
void dsa_output_shape(const struct dsa_call *call, int output, int64_t shape[MAX_NDIM]);
dsa_tvm_status dsa_check_outputs(struct dsa_call *call, dsa_tvm_tensor *const *outputs);
int dsa_overlap(const dsa_tvm_tensor *a, const dsa_tvm_tensor *b);

/* device.c: the device that most inputs are on is the call's; and whether a tensor is on it. */
void dsa_find_device(struct dsa_call *call, const dsa_tvm_tensor *const *inputs);
dsa_tvm_status dsa_check_device(const struct dsa_call *call, const struct tensor_spec *spec, const dsa_tvm_tensor *x);

/* cpu/operators.c: computes a checked call whose tensors are on the CPU. */
dsa_tvm_status dsa_run(const struct dsa_call *call, const struct dsa_executor *executor);

/* cuda/operators.c, or cuda/none.c in a library without CUDA kernels, for checked calls whose tensors are on a GPU.
 * dsa_cuda_workspace tells the bytes of workspace: those of this very call, or those that suffice for tensors of its
 * shapes at any address. dsa_cuda_run enqueues a call with the options' workspace (they are whole); `known` are the bytes
 * of this very call, or NULL. dsa_cuda_run_pooled takes the workspace from the driver. */
extern const int dsa_has_cuda;
dsa_tvm_status dsa_cuda_workspace(const struct dsa_call *call, int any_address, uint64_t *bytes);
dsa_tvm_status dsa_cuda_run(const struct dsa_call *call, const uint64_t *known, const dsa_tvm_options *options);
dsa_tvm_status dsa_cuda_run_pooled(const struct dsa_call *call, void *stream);

/* cpu/rows.c: new rows of a cache, a checked call too. */
dsa_tvm_status dsa_write_rows(const struct dsa_call *call, const struct dsa_executor *executor);

/* cpu/threads.c: the library's own threads. 0: the process default. */
struct dsa_executor dsa_pool_executor(int32_t num_threads);
int dsa_process_cpus(void); /* that this process may use */
/* Runs a loop on the threads of an executor. One task, or a loop for one thread, runs on the calling thread. */
void dsa_parallel_for(const struct dsa_executor *executor, int threads, int64_t count, dsa_task task, void *arg);
/* For a library that is about to be unloaded: stops its threads, and waits at most that long for them. */
void dsa_stop_threads(int seconds);

/* cpu/ceilings.c: the most floating-point operations that so many threads do in a second, in multiply-adds of an element
 * type with the instructions of a target; 0 where it has none for that type. And the most bytes that they read in a
 * second where they read as many again and again, from whatever cache holds them; 0 where there is no memory. */
enum { DSA_FLOAT32, DSA_BFLOAT16, DSA_INT8, DSA_NUM_PRODUCTS };
double dsa_peak(const char *target, int product, int threads, double seconds);
double dsa_read_rate(const char *target, int64_t bytes, int threads, double seconds);

/* TVM's calling convention: packed arguments. */
enum { TVM_NONE = 0, TVM_INT = 1, TVM_FLOAT = 3, TVM_TENSOR_POINTER = 7, TVM_TENSOR_OBJECT = 70 };
struct tvm_any {
  int32_t type_index;
  uint32_t padding;
  union {
    int64_t i;
    double f;
    void *p;
  } value;
};
typedef int (*dsa_kernel)(void *self, const struct tvm_any *args, int32_t num_args, struct tvm_any *result);

/* The compiled kernels of one operator, and what is needed to cut its work into tasks. The rows of a table are for
 * different sizes. A call takes the first row that serves its lengths and has a kernel for its element types. The last
 * row serves all lengths. */
struct indexer_kernel {
  int64_t s_q, s_kv;                        /* the largest lengths it serves */
  int last;                                 /* whether no row follows */
  dsa_kernel entry[NUM_DTYPES][NUM_DTYPES]; /* by element types of q and k; NULL: not compiled */
  int64_t rows, task_keys, block_keys, min_keys, tasks_per_thread;
};

struct topk_kernel {
  int64_t s_q, s_kv;
  int last;
  dsa_kernel entry;
};

struct mla_kernel {
  int64_t s_q, s_kv;
  int last;
  dsa_kernel entry[NUM_DTYPES][NUM_DTYPES]; /* by element types of q and of the rows; e4m3 stands for packed ones */
  int64_t heads, task_heads;
};

/* The tables of one target, or the rows of them that were picked for a call. */
struct kernel_set {
  const char *target;
  int level;     /* of x86-64 that it needs; 0 for Arm */
  unsigned dots; /* features beside the level or the baseline: the bits of common/x86_level.h or arm_features.h */
  const struct indexer_kernel *indexer;
  const struct topk_kernel *topk;
  const struct mla_kernel *mla;
};

/* Generated; best target first. */
extern const struct kernel_set dsa_kernel_sets[];
extern const int dsa_num_kernel_sets;

/* cpu/runs.c: whether this CPU runs a set. If that takes AMX, the process may use tiles from then on. */
int dsa_cpu_runs(const struct kernel_set *set);

/* choose.c: the kernels for this CPU. NULL, with an error set, if there are none. */
const struct kernel_set *dsa_kernels(void);

/* cpu/kernels.c: calls of compiled kernels. */
struct tvm_any dsa_arg_tensor(dsa_tvm_tensor *tensor);
struct tvm_any dsa_arg_int(int64_t value);
struct tvm_any dsa_arg_float(double value);

/* The error of the first kernel that failed, for the thread that started the work. Later tasks are skipped. */
struct dsa_outcome {
  atomic_int failed;
  dsa_tvm_status status;
  char message[512];
};
void dsa_call_kernel(struct dsa_outcome *outcome, dsa_kernel kernel, const struct tvm_any *args, int num_args);

#endif
