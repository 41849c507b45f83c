/* The entry points of a library that is made for measuring. It has one operator, with the default kernels and those of
 * a candidate. TVM's runtime calls it, on this machine or through RPC on another. */
#include <pthread.h>
#include <time.h>

#include "common/internal.h"

#define INVALID(...) dsa_fail(DSA_TVM_INVALID_ARGUMENT, __VA_ARGS__)

enum { TVM_OBJECT_HEADER = 24 }; /* bytes before the DLTensor of a tensor object */
enum { MOST_MILLISECONDS = 60000, MOST_MEASURED_THREADS = 1024 };

/* A function of TVM, which the calling process has. Weak, so that the linker still reports other missing symbols. */
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) __attribute__((weak));

static const struct op_spec *const op = &dsa_ops[MEASURED_OP];

/* The kernel set that the calling thread asked for. */
static _Thread_local int64_t chosen;

const struct kernel_set *dsa_kernels(void) { return &dsa_kernel_sets[chosen]; }

/* TVM unloads a library with the last reference to it, and then idle threads would have no code to run. This runs at
 * the end of a process too, so it must not wait for ever for a kernel that hangs. */
__attribute__((destructor)) static void stop_threads(void) { dsa_stop_threads(1); }

/* Kernels whose instructions the CPU lacks would end the process, which may be somebody else's RPC server. All sets are
 * of one target. */
static int cpu_runs;
static void look_at_cpu(void) { cpu_runs = dsa_cpu_runs(&dsa_kernel_sets[0]); }
static dsa_tvm_status check_cpu(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, look_at_cpu);
  return cpu_runs ? DSA_TVM_OK
                  : dsa_fail(DSA_TVM_UNSUPPORTED, "target: expected one this CPU runs, got %s", dsa_kernel_sets[0].target);
}

static double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int returned(dsa_tvm_status status) {
  if (status == DSA_TVM_OK) return 0;
  if (TVMFFIErrorSetRaisedFromCStr)
    TVMFFIErrorSetRaisedFromCStr(status == DSA_TVM_INVALID_ARGUMENT ? "ValueError" : "RuntimeError",
                                 dsa_tvm_last_error());
  return -1;
}

static dsa_tvm_status read_int(const struct tvm_any *any, const char *name, int64_t low, int64_t high, int64_t *value) {
  if (any->type_index != TVM_INT)
    return INVALID("%s: %s: expected an integer, got TVM type %d", op->name, name, (int)any->type_index);
  if (any->value.i < low || any->value.i > high)
    return INVALID("%s: %s: expected %lld..%lld, got %lld", op->name, name, (long long)low, (long long)high,
                   (long long)any->value.i);
  *value = any->value.i;
  return DSA_TVM_OK;
}

static dsa_tvm_status read_attr(const struct tvm_any *any, const struct attr_spec *spec, dsa_tvm_attr *attr) {
  if (!spec->is_float) return read_int(any, spec->name, INT64_MIN, INT64_MAX, &attr->i);
  if (any->type_index != TVM_FLOAT && any->type_index != TVM_INT)
    return INVALID("%s: %s: expected a number, got TVM type %d", op->name, spec->name, (int)any->type_index);
  attr->f = any->type_index == TVM_FLOAT ? any->value.f : (double)any->value.i;
  return DSA_TVM_OK;
}

/* None becomes a null pointer, which stands for an optional input that is left out. */
static dsa_tvm_status read_tensor(const struct tvm_any *any, const char *name, dsa_tvm_tensor **tensor) {
  *tensor = NULL;
  if (any->type_index == TVM_TENSOR_POINTER)
    *tensor = any->value.p;
  else if (any->type_index == TVM_TENSOR_OBJECT)
    *tensor = (dsa_tvm_tensor *)((char *)any->value.p + TVM_OBJECT_HEADER);
  else if (any->type_index != TVM_NONE)
    return INVALID("%s: %s: expected a tensor or None, got TVM type %d", op->name, name, (int)any->type_index);
  return DSA_TVM_OK;
}

/* Runs the operator as for any other caller: reads the arguments, checks them, and computes. */
static dsa_tvm_status run(const struct tvm_any *args, int32_t threads) {
  dsa_tvm_tensor *inputs[MAX_INPUTS], *outputs[MAX_OUTPUTS];
  dsa_tvm_attr attrs[MAX_ATTRS];
  dsa_tvm_status status = DSA_TVM_OK;
  for (int i = 0; status == DSA_TVM_OK && i < op->num_inputs; i++)
    status = read_tensor(args++, op->inputs[i].name, &inputs[i]);
  for (int i = 0; status == DSA_TVM_OK && i < op->num_attrs; i++)
    status = read_attr(args++, &op->attrs[i], &attrs[i]);
  for (int i = 0; status == DSA_TVM_OK && i < op->num_outputs; i++)
    status = read_tensor(args++, op->outputs[i].name, &outputs[i]);
  struct dsa_call call = {.op = op};
  if (status == DSA_TVM_OK) status = dsa_check_inputs(&call, (const dsa_tvm_tensor *const *)inputs, attrs);
  if (status == DSA_TVM_OK) status = dsa_check_outputs(&call, outputs);
  if (status != DSA_TVM_OK) return status;
  struct dsa_executor executor = dsa_pool_executor(threads);
  return dsa_run(&call, &executor);
}

/* Reads the first arguments of `call` and `time`: which set, and how many threads. `given` counts all arguments. */
static dsa_tvm_status read_head(const struct tvm_any *args, int32_t given, int32_t head, int64_t *threads) {
  int32_t expected = head + op->num_inputs + op->num_attrs + op->num_outputs;
  if (given != expected)
    return INVALID("%s: expected %d arguments, got %d", op->name, (int)expected, (int)given);
  dsa_tvm_status status = read_int(&args[0], "which", 0, dsa_num_kernel_sets - 1, &chosen);
  if (status == DSA_TVM_OK) status = read_int(&args[1], "threads", 1, MOST_MEASURED_THREADS, threads);
  return status != DSA_TVM_OK ? status : check_cpu();
}

/* call(which, threads, inputs..., attributes..., outputs...) */
DSA_TVM_API int __tvm_ffi_call(void *self, const struct tvm_any *args, int32_t num_args, struct tvm_any *result) {
  (void)self, (void)result;
  int64_t threads;
  dsa_tvm_status status = read_head(args, num_args, 2, &threads);
  return returned(status != DSA_TVM_OK ? status : run(args + 2, (int32_t)threads));
}

/* time(which, threads, number, inputs..., attributes..., outputs...) -> seconds of one of `number` calls in a row */
DSA_TVM_API int __tvm_ffi_time(void *self, const struct tvm_any *args, int32_t num_args, struct tvm_any *result) {
  (void)self;
  int64_t threads, number;
  dsa_tvm_status status = read_head(args, num_args, 3, &threads);
  if (status == DSA_TVM_OK) status = read_int(&args[2], "number", 1, INT32_MAX, &number);
  double start = seconds_now();
  for (int64_t i = 0; status == DSA_TVM_OK && i < number; i++) status = run(args + 3, (int32_t)threads);
  if (status != DSA_TVM_OK) return returned(status);
  result->type_index = TVM_FLOAT;
  result->value.f = (seconds_now() - start) / (double)number;
  return 0;
}

/* peak(product, threads, milliseconds) -> GFLOP/s of multiply-adds of a type, by its number in internal.h; 0: the target
 * has none */
DSA_TVM_API int __tvm_ffi_peak(void *self, const struct tvm_any *args, int32_t num_args, struct tvm_any *result) {
  (void)self;
  int64_t product, threads, milliseconds;
  dsa_tvm_status status = DSA_TVM_OK;
  if (num_args != 3) status = INVALID("peak: expected 3 arguments, got %d", (int)num_args);
  if (status == DSA_TVM_OK) status = read_int(&args[0], "product", 0, DSA_NUM_PRODUCTS - 1, &product);
  if (status == DSA_TVM_OK) status = read_int(&args[1], "threads", 1, MOST_MEASURED_THREADS, &threads);
  if (status == DSA_TVM_OK) status = read_int(&args[2], "milliseconds", 1, MOST_MILLISECONDS, &milliseconds);
  if (status == DSA_TVM_OK) status = check_cpu();
  if (status != DSA_TVM_OK) return returned(status);
  double seconds = (double)milliseconds / 1e3;
  result->type_index = TVM_FLOAT;
  result->value.f = 1e-9 * dsa_peak(dsa_kernel_sets[0].target, (int)product, (int)threads, seconds);
  return 0;
}

/* cpus() -> CPUs this process may use */
DSA_TVM_API int __tvm_ffi_cpus(void *self, const struct tvm_any *args, int32_t num_args, struct tvm_any *result) {
  (void)self, (void)args, (void)num_args;
  result->type_index = TVM_INT;
  result->value.i = dsa_process_cpus();
  return 0;
}
