/* Argument checks. They follow the operator tables, and know no particular operator. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/float_mode.h"
#include "common/internal.h"

#define INVALID(...) dsa_fail(DSA_TVM_INVALID_ARGUMENT, __VA_ARGS__)

/* A message that is put together from pieces. Only the functions that refuse something have one, because to clear it
 * takes longer than to check a tensor. */
struct text {
  char data[256];
  size_t used;
};

static void add(struct text *t, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void add(struct text *t, const char *format, ...) {
  va_list args;
  va_start(args, format);
  int n = vsnprintf(t->data + t->used, sizeof t->data - t->used, format, args);
  va_end(args);
  if (n > 0) t->used = t->used + (size_t)n < sizeof t->data ? t->used + (size_t)n : sizeof t->data - 1;
}

static const char *shape_text(struct text *t, const int64_t *shape, int ndim) {
  add(t, "[");
  for (int i = 0; i < ndim && i < 8; i++) add(t, i ? ", %lld" : "%lld", (long long)shape[i]);
  add(t, ndim > 8 ? ", ...]" : "]");
  return t->data;
}

/* Such as [s_kv, d_idx=128]: names, and the lengths that are known. A length that is a sum is followed by its terms. */
static const char *expected_shape(struct text *t, const struct tensor_spec *spec, const int64_t *dim) {
  add(t, "[");
  for (int i = 0; i < spec->ndim; i++) {
    const struct dim_spec *d = &dsa_dims[spec->dims[i]];
    add(t, "%s%s", i ? ", " : "", d->name);
    if (dim[spec->dims[i]] >= 0) add(t, "=%lld", (long long)dim[spec->dims[i]]);
    for (int p = 0; p < d->num_parts; p++)
      add(t, "%s%s=%lld%s", p ? ", " : " (", dsa_dims[d->parts[p].dim].name, (long long)dim[d->parts[p].dim],
          p + 1 < d->num_parts ? "" : ")");
  }
  add(t, "]");
  return t->data;
}

static const char *dtype_text(struct text *t, const dsa_tvm_tensor *x) {
  for (int i = 0; i < NUM_DTYPES; i++)
    if (dsa_dtypes[i].code == x->dtype.code && dsa_dtypes[i].bits == x->dtype.bits && x->dtype.lanes == 1)
      return dsa_dtypes[i].name;
  /* By DLPack's code. The names in `families` end in the number of bits; those in `whole` have one width. */
  static const char *const families[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
  static const char *const whole[] = {"bool",            "float8_e3m4",   "float8_e4m3",     "float8_e4m3b11fnuz",
                                      "float8_e4m3fn",   "float8_e4m3fnuz", "float8_e5m2",
                                      "float8_e5m2fnuz", "float8_e8m0fnu"};
  int code = x->dtype.code, num_families = (int)(sizeof families / sizeof *families);
  if (code < num_families)
    add(t, "%s%d", families[code], x->dtype.bits);
  else if (code - num_families < (int)(sizeof whole / sizeof *whole))
    add(t, "%s", whole[code - num_families]);
  else
    add(t, "a type of %d bits with DLPack's code %d", x->dtype.bits, code);
  if (x->dtype.lanes != 1) add(t, " in vectors of %d", x->dtype.lanes);
  return t->data;
}

static dsa_tvm_status refuse_length(const char *op, const char *argument, const struct dim_spec *dim, int64_t length) {
  struct text served = {{0}, 0};
  for (int i = 0; i < dim->num_values; i++) add(&served, i ? ", %lld" : "%lld", (long long)dim->values[i]);
  if (length < dim->minimum || length > dim->maximum || length % dim->multiple)
    return INVALID("%s: %s: expected %s to be one this library serves (%s), got %lld", op, argument, dim->name,
                   served.data, (long long)length);
  return INVALID("%s: %s: expected %s to be one this library serves (%s), got %lld; dsa-tvm build %s %lld makes "
                 "a library that serves it",
                 op, argument, dim->name, served.data, (long long)length, dim->flag, (long long)length);
}

static dsa_tvm_status check_length(const char *op, const char *argument, int d, int64_t length) {
  const struct dim_spec *dim = &dsa_dims[d];
  if (dim->values) {
    for (int i = 0; i < dim->num_values; i++)
      if (dim->values[i] == length) return DSA_TVM_OK;
    return refuse_length(op, argument, dim, length);
  }
  if (length < dim->minimum || length > dim->maximum)
    return INVALID("%s: %s: expected %s in %lld..%lld, got %lld", op, argument, dim->name, (long long)dim->minimum,
                   (long long)dim->maximum, (long long)length);
  return DSA_TVM_OK;
}

static dsa_tvm_status bind(struct dsa_call *call, const char *argument, int d, int64_t length) {
  dsa_tvm_status status = check_length(call->op->name, argument, d, length);
  if (status == DSA_TVM_OK) call->dim[d] = length;
  return status;
}

/* Checks that no dimension exceeds the one that limits it. */
static dsa_tvm_status check_limits(const struct dsa_call *call) {
  for (int d = 0; d < NUM_DIMS; d++) {
    int limit = dsa_dims[d].at_most;
    if (call->dim[d] >= 0 && limit >= 0 && call->dim[limit] >= 0 && call->dim[d] > call->dim[limit])
      return INVALID("%s: %s: expected at most %s=%lld, got %lld", call->op->name, dsa_dims[d].name,
                     dsa_dims[limit].name, (long long)call->dim[limit], (long long)call->dim[d]);
  }
  return DSA_TVM_OK;
}

/* Computes a length that is a sum of others, which are known. */
static dsa_tvm_status determine(struct dsa_call *call, int d) {
  const struct dim_spec *dim = &dsa_dims[d];
  dsa_tvm_status status = check_limits(call);
  if (status != DSA_TVM_OK) return status;
  int64_t sum = 0;
  for (int p = 0; p < dim->num_parts; p++) {
    int64_t length = call->dim[dim->parts[p].dim];
    if (length % dim->parts[p].each)
      return INVALID("%s: %s: expected a multiple of %d, got %lld", call->op->name, dsa_dims[dim->parts[p].dim].name,
                     dim->parts[p].each, (long long)length);
    sum += length / dim->parts[p].each * dim->parts[p].adds;
  }
  call->dim[d] = sum;
  return DSA_TVM_OK;
}

/* Whether a variant has the types that are bound. */
static int fits(const struct dsa_call *call, const int8_t *variant) {
  for (int v = 0; v < MAX_TYPE_VARS; v++)
    if (call->type[v] >= 0 && variant[v] != call->type[v]) return 0;
  return 1;
}

static dsa_tvm_status refuse_type(const struct dsa_call *call, const struct tensor_spec *spec,
                                  const dsa_tvm_tensor *x) {
  const struct op_spec *op = call->op;
  struct text got = {{0}, 0}, want = {{0}, 0};
  if (spec->dtype >= 0) add(&want, "%s", dsa_dtypes[spec->dtype].name);
  unsigned listed = 0;
  for (int v = 0; v < op->num_variants && spec->dtype < 0; v++) {
    int candidate = op->variants[v][-1 - spec->dtype];
    if (!fits(call, op->variants[v]) || listed & 1u << candidate) continue;
    add(&want, listed ? " or %s" : "%s", dsa_dtypes[candidate].name);
    listed |= 1u << candidate;
  }
  return INVALID("%s: %s: expected %s, got %s", op->name, spec->name, want.data, dtype_text(&got, x));
}

static int has_type(const dsa_tvm_tensor *x, int type) {
  return dsa_dtypes[type].code == x->dtype.code && dsa_dtypes[type].bits == x->dtype.bits && x->dtype.lanes == 1;
}

static dsa_tvm_status check_type(struct dsa_call *call, const struct tensor_spec *spec, const dsa_tvm_tensor *x) {
  if (spec->dtype >= 0) return has_type(x, spec->dtype) ? DSA_TVM_OK : refuse_type(call, spec, x);
  /* A type variable. Some variant must have this type here, and the types that were bound before. */
  const struct op_spec *op = call->op;
  int variable = -1 - spec->dtype;
  for (int v = 0; v < op->num_variants; v++) {
    if (!has_type(x, op->variants[v][variable]) || !fits(call, op->variants[v])) continue;
    call->type[variable] = op->variants[v][variable];
    return DSA_TVM_OK;
  }
  return refuse_type(call, spec, x);
}

static dsa_tvm_status refuse_rank(const struct dsa_call *call, const struct tensor_spec *spec,
                                  const dsa_tvm_tensor *x) {
  struct text want = {{0}, 0};
  return INVALID("%s: %s: expected rank %d %s, got rank %d", call->op->name, spec->name, spec->ndim,
                 expected_shape(&want, spec, call->dim), (int)x->ndim);
}

static dsa_tvm_status refuse_shape(const struct dsa_call *call, const struct tensor_spec *spec,
                                   const dsa_tvm_tensor *x) {
  struct text got = {{0}, 0}, want = {{0}, 0};
  return INVALID("%s: %s: expected shape %s, got %s", call->op->name, spec->name,
                 expected_shape(&want, spec, call->dim), shape_text(&got, x->shape, x->ndim));
}

static dsa_tvm_status refuse_strides(const char *op, const char *name, const dsa_tvm_tensor *x) {
  struct text got = {{0}, 0};
  return INVALID("%s: %s: expected a contiguous tensor, got strides %s", op, name,
                 shape_text(&got, x->strides, x->ndim));
}

static dsa_tvm_status check_layout(const char *op, const char *name, const dsa_tvm_tensor *x, int64_t *count) {
  *count = 1;
  int empty = 0;
  for (int i = 0; i < x->ndim; i++) {
    /* The bounds of the dimensions alone do not keep the number of elements below 2**63. */
    if (x->shape[i] && *count > INT64_MAX / 8 / x->shape[i])
      return INVALID("%s: %s: expected fewer than 2**60 elements, got more", op, name);
    *count *= x->shape[i];
    empty |= x->shape[i] == 0;
  }
  int64_t stride = 1;
  for (int i = x->ndim - 1; x->strides && !empty && i >= 0; i--) {
    if (x->shape[i] != 1 && x->strides[i] != stride) return refuse_strides(op, name, x);
    stride *= x->shape[i];
  }
  return DSA_TVM_OK;
}

static dsa_tvm_status check_tensor(struct dsa_call *call, const struct tensor_spec *spec, const dsa_tvm_tensor *x,
                                   dsa_tvm_tensor *checked) {
  const char *op = call->op->name;
  dsa_tvm_status status = dsa_check_device(call, spec, x);
  if (status != DSA_TVM_OK) return status;
  status = check_type(call, spec, x);
  if (status != DSA_TVM_OK) return status;
  if (x->ndim != spec->ndim) return refuse_rank(call, spec, x);
  if (!x->shape) return INVALID("%s: %s: expected a shape, got a null pointer", op, spec->name);
  for (int i = 0; i < spec->ndim; i++) {
    int d = spec->dims[i];
    if (dsa_dims[d].num_parts && (status = determine(call, d)) != DSA_TVM_OK) return status;
    if (call->dim[d] >= 0 && x->shape[i] != call->dim[d]) return refuse_shape(call, spec, x);
    if (call->dim[d] < 0 && (status = bind(call, spec->name, d, x->shape[i])) != DSA_TVM_OK) return status;
  }
  int64_t count;
  if ((status = check_layout(op, spec->name, x, &count)) != DSA_TVM_OK) return status;
  if (count && !x->data) return INVALID("%s: %s: expected data, got a null pointer", op, spec->name);
  *checked = *x;
  /* Compute with integers: a hostile offset must not wrap, and a tensor must not reach beyond the last address. */
  uintptr_t address = (uintptr_t)x->data;
  uint64_t bytes = (uint64_t)count * (x->dtype.bits / 8u);
  if (x->data && (x->byte_offset > UINTPTR_MAX - address || bytes > UINTPTR_MAX - address - x->byte_offset))
    return INVALID("%s: %s: expected memory below the end of the address space, got %llu bytes at %p + %llu", op,
                   spec->name, (unsigned long long)bytes, x->data, (unsigned long long)x->byte_offset);
  if (x->data) address += x->byte_offset;
  checked->data = (void *)address;
  checked->byte_offset = 0;
  checked->device.device_id = 0; /* there is one CPU, whatever its number, and kernels want equal numbers */
  checked->strides = NULL;
  if ((uintptr_t)checked->data % (x->dtype.bits / 8u))
    return INVALID("%s: %s: expected data aligned to its element's %d bytes, got the address %p", op, spec->name,
                   x->dtype.bits / 8, checked->data);
  return DSA_TVM_OK;
}

static size_t byte_size(const dsa_tvm_tensor *x) {
  size_t size = x->dtype.bits / 8u;
  for (int i = 0; i < x->ndim; i++) size *= (size_t)x->shape[i];
  return size;
}

int dsa_overlap(const dsa_tvm_tensor *a, const dsa_tvm_tensor *b) {
  uintptr_t a0 = (uintptr_t)a->data, b0 = (uintptr_t)b->data;
  size_t na = byte_size(a), nb = byte_size(b);
  return na && nb && a0 < b0 + nb && b0 < a0 + na;
}

/* The kernels compute in float. Rounding here gives all of them the same number in any floating-point mode of the
 * caller. */
static double rounded(double x) {
  const struct dsa_float_mode mode = dsa_enter_float_mode();
  volatile float nearest = (float)x;
  dsa_leave_float_mode(mode);
  return nearest;
}

static dsa_tvm_status check_attr(struct dsa_call *call, const struct attr_spec *spec, int i) {
  const dsa_tvm_attr attr = call->attr[i];
  if (spec->is_float) {
    call->attr[i].f = rounded(attr.f);
    if (!isfinite(call->attr[i].f))
      return INVALID("%s: %s: expected a finite float32, got %g", call->op->name, spec->name, attr.f);
  }
  if (spec->dim < 0) return DSA_TVM_OK;
  return bind(call, spec->name, spec->dim, attr.i);
}

dsa_tvm_status dsa_check_inputs(struct dsa_call *call, const dsa_tvm_tensor *const *inputs, const dsa_tvm_attr *attrs) {
  const struct op_spec *op = call->op;
  dsa_tvm_status status;
  for (int d = 0; d < NUM_DIMS; d++) call->dim[d] = -1;
  memset(call->type, -1, sizeof call->type);
  dsa_find_device(call, inputs);
  for (int i = 0; i < op->num_attrs; i++) {
    call->attr[i] = attrs[i];
    if ((status = check_attr(call, &op->attrs[i], i)) != DSA_TVM_OK) return status;
  }
  for (int i = 0; i < op->num_inputs; i++) {
    call->present[i] = inputs[i] != NULL;
    if (!inputs[i] && op->inputs[i].optional) continue;
    if (!inputs[i]) return INVALID("%s: %s: expected a tensor, got a null pointer", op->name, op->inputs[i].name);
    if ((status = check_tensor(call, &op->inputs[i], inputs[i], &call->in[i])) != DSA_TVM_OK) return status;
  }
  return check_limits(call);
}

void dsa_output_shape(const struct dsa_call *call, int output, int64_t shape[MAX_NDIM]) {
  const struct tensor_spec *spec = &call->op->outputs[output];
  for (int i = 0; i < MAX_NDIM; i++) shape[i] = i < spec->ndim ? call->dim[spec->dims[i]] : 0;
}

dsa_tvm_status dsa_check_outputs(struct dsa_call *call, dsa_tvm_tensor *const *outputs) {
  const struct op_spec *op = call->op;
  for (int i = 0; i < op->num_outputs; i++) {
    const char *name = op->outputs[i].name;
    if (!outputs[i]) return INVALID("%s: %s: expected a tensor, got a null pointer", op->name, name);
    dsa_tvm_status status = check_tensor(call, &op->outputs[i], outputs[i], &call->out[i]);
    if (status != DSA_TVM_OK) return status;
    const char *shared = NULL;
    int may_be = op->outputs[i].may_be;
    for (int j = 0; j < op->num_inputs; j++) {
      if (!call->present[j] || !dsa_overlap(&call->out[i], &call->in[j])) continue;
      /* Both have the same type and shape, so if they begin together, they end together. */
      if (j != may_be || call->out[i].data != call->in[j].data) shared = op->inputs[j].name;
    }
    for (int j = 0; j < i; j++)
      if (dsa_overlap(&call->out[i], &call->out[j])) shared = op->outputs[j].name;
    if (shared && may_be < 0)
      return INVALID("%s: %s: expected memory that does not overlap `%s`, got an overlap", op->name, name, shared);
    if (shared)
      return INVALID("%s: %s: expected `%s` itself, or memory that does not overlap `%s`, got an overlap", op->name, name,
                     op->inputs[may_be].name, shared);
  }
  return DSA_TVM_OK;
}
