/* Calls whose tensors are Python objects of a type with DLPack's C exchange interface, such as torch.Tensor. Reading a
 * tensor through it takes a tenth of the time that Python takes. Only the Python package calls these two functions. It
 * passes Python's own functions, so the library needs no Python to be linked or loaded. */
#include <stddef.h>

#include "common/internal.h"

/* The beginning of DLPackExchangeAPI of DLPack 1.3. Its functions return 0, or set a Python error. */
struct exchange {
  uint32_t major, minor;
  const struct exchange *previous;
  int (*allocate)(void), (*lend)(void), (*give)(void); /* of managed tensors: not used here */
  int (*view)(void *object, dsa_tvm_tensor *view);
  int (*current_stream)(int32_t device_type, int32_t device_id, void **stream);
};

struct python {
  const struct exchange *exchange;             /* of the tensors' type */
  const void *none;                            /* None */
  void *(*item)(void *tuple, ptrdiff_t index); /* PyTuple_GetItem */
  void (*clear_error)(void);                   /* PyErr_Clear */
  void *(*release)(void);                      /* PyEval_SaveThread, and PyEval_RestoreThread */
  void (*acquire)(void *thread);
};

/* A call between its two steps. runtime/exchange.py has the same structure. */
struct object_call {
  const struct python *python;
  dsa_tvm_plan *plan;
  const char *op;
  const dsa_tvm_attr *attrs;
  int64_t (*shapes)[3], (*strides)[3]; /* of outputs that are to be allocated; written by the first step */
  dsa_tvm_tensor *outputs; /* written by the first step, except for the data of those */
  int32_t num_inputs, num_attrs, num_outputs, num_threads;
  void *workspace;
  uint64_t workspace_size; /* written by the first step, as is what follows */
  void *stream;
  int32_t device_id;
};

/* What the first step found: a call on the CPU, a call on a GPU, or arguments that are refused or cannot be viewed. */
enum { ON_CPU = 0, ON_GPU = 1, REFUSED = -1 };

/* Returns whether all items of a tuple have a view or are None. */
static int view_all(const struct python *python, void *tuple, int count, dsa_tvm_tensor *views,
                    const dsa_tvm_tensor **pointers) {
  for (int i = 0; i < count; i++) {
    void *object = python->item(tuple, i);
    pointers[i] = object == python->none ? NULL : &views[i];
    if (object && (object == python->none || !python->exchange->view(object, &views[i]))) continue;
    python->clear_error();
    return 0;
  }
  return 1;
}

/* Describes the outputs that the call needs. */
static void expect_outputs(struct object_call *call) {
  const struct dsa_call *checked = &call->plan->call;
  for (int i = 0; i < call->num_outputs; i++) {
    const struct tensor_spec *spec = &checked->op->outputs[i];
    const struct dtype_spec *type = &dsa_dtypes[spec->dtype >= 0 ? spec->dtype : checked->type[-1 - spec->dtype]];
    dsa_tvm_tensor *x = &call->outputs[i];
    *x = (dsa_tvm_tensor){.ndim = spec->ndim, .shape = call->shapes[i]};
    x->device.device_type = checked->device_type;
    x->device.device_id = checked->device_id;
    x->dtype.code = type->code;
    x->dtype.bits = type->bits;
    x->dtype.lanes = 1;
    int64_t stride = 1;
    for (int j = spec->ndim - 1; j >= 0; j--) {
      call->strides[i][j] = stride;
      stride *= x->shape[j] ? x->shape[j] : 1; /* as torch counts them */
    }
  }
}

/* The first step: views the inputs, and the outputs if they are a tuple and not None, and prepares the call. The caller
 * holds Python's lock. Loading kernels for a GPU takes seconds, and other threads may have the lock meanwhile. */
DSA_TVM_API int dsa_tvm_prepare_objects(struct object_call *call, void *inputs, void *outputs) {
  const struct python *python = call->python;
  dsa_tvm_tensor views[MAX_INPUTS];
  const dsa_tvm_tensor *pointers[MAX_INPUTS > MAX_OUTPUTS ? MAX_INPUTS : MAX_OUTPUTS];
  int given = outputs != python->none;
  if (given && !view_all(python, outputs, call->num_outputs, call->outputs, pointers)) return REFUSED;
  if (!view_all(python, inputs, call->num_inputs, views, pointers)) return REFUSED;
  int on_gpu = pointers[0] && (int32_t)views[0].device.device_type == CUDA_DEVICE;
  void *thread = on_gpu ? python->release() : NULL;
  dsa_tvm_status status =
      dsa_tvm_prepare(call->plan, call->op, pointers, call->num_inputs, call->attrs, call->num_attrs, call->shapes,
                      call->num_outputs, &call->workspace_size);
  if (on_gpu) python->acquire(thread);
  if (status != DSA_TVM_OK) return REFUSED;
  call->device_id = call->plan->call.device_id;
  call->stream = NULL;
  if (!given) expect_outputs(call);
  if (!on_gpu) return ON_CPU;
  if (!python->exchange->current_stream(CUDA_DEVICE, call->device_id, &call->stream)) return ON_GPU;
  python->clear_error();
  return REFUSED;
}

/* The second step: computes. */
DSA_TVM_API int dsa_tvm_run_objects(const struct object_call *call) {
  dsa_tvm_tensor *pointers[MAX_OUTPUTS];
  for (int i = 0; i < call->num_outputs; i++) pointers[i] = &call->outputs[i];
  dsa_tvm_options options = {sizeof options, call->num_threads, call->stream, call->workspace, call->workspace_size};
  return dsa_tvm_run(call->plan, pointers, call->num_outputs, &options);
}
