/* What ONNX Runtime knows of an operator before it runs: name, types, and shapes as far as a model fixes them. */
#include "ort/ort.h"

/* Before it calls a shape inference, ONNX Runtime up to 1.23 dereferences the type of an input that is left out. It
 * would crash while it loads such a model. */
enum { MINOR_WITH_SAFE_INFERENCE = 24 };

static const struct ort_op *op_of(const OrtCustomOp *op) { return (const struct ort_op *)op; }

static int element_type(const struct ort_op *op, const struct tensor_spec *tensor) {
  return dsa_dtypes[tensor->dtype >= 0 ? tensor->dtype : op->types[-1 - tensor->dtype]].onnx;
}

static const char *name(const OrtCustomOp *op) { return op_of(op)->spec->onnx_name; }

static const char *provider(const OrtCustomOp *op) {
  return op_of(op)->on_gpu ? "CUDAExecutionProvider" : NULL; /* NULL: the CPU */
}

static int input_type(const OrtCustomOp *op, size_t i) { return element_type(op_of(op), &op_of(op)->spec->inputs[i]); }

static size_t num_inputs(const OrtCustomOp *op) { return (size_t)op_of(op)->spec->num_inputs; }

static int output_type(const OrtCustomOp *op, size_t i) {
  return element_type(op_of(op), &op_of(op)->spec->outputs[i]);
}

static size_t num_outputs(const OrtCustomOp *op) { return (size_t)op_of(op)->spec->num_outputs; }

static int input_kind(const OrtCustomOp *op, size_t i) {
  return op_of(op)->spec->inputs[i].optional ? ORT_ARGUMENT_OPTIONAL : ORT_ARGUMENT_REQUIRED;
}

static int output_kind(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_ARGUMENT_REQUIRED;
}

static int memory_type(const OrtCustomOp *op, size_t i) {
  (void)op, (void)i;
  return ORT_MEMORY_DEFAULT;
}

static int one(const OrtCustomOp *op) {
  (void)op;
  return 1;
}

/* After a failed query the model lacks some inferred shapes, but it still runs. */
static int ok(const OrtApi *api, OrtStatus *status) {
  if (status) api->ReleaseStatus(status);
  return !status;
}

/* What the inputs and attributes of a node tell. ONNX Runtime calls the inference of one variant for all variants, so
 * the element types have to be found here too. */
struct knowledge {
  struct length {
    int64_t value;      /* or -1, */
    const char *symbol; /* and then perhaps a symbol */
  } lengths[NUM_DIMS];
  int types[MAX_TYPE_VARS]; /* ONNX's numbers, or 0 */
};

static void learn_from_input(const OrtApi *api, const OrtShapeInferContext *context, const struct tensor_spec *spec,
                             size_t i, struct knowledge *known) {
  OrtTensorTypeAndShapeInfo *info = NULL;
  int type;
  size_t rank;
  int64_t values[MAX_NDIM];
  const char *symbols[MAX_NDIM];
  if (!ok(api, api->ShapeInferContext_GetInputTypeShape(context, i, &info)) || !info) return;
  if (spec->dtype < 0 && ok(api, api->GetTensorElementType(info, &type))) known->types[-1 - spec->dtype] = type;
  /* Rank 0 also means an absent input or an unknown rank. A wrong rank is reported when the kernel runs. */
  if (!ok(api, api->GetDimensionsCount(info, &rank)) || rank != (size_t)spec->ndim) return;
  if (!ok(api, api->GetDimensions(info, values, rank))) return;
  if (!ok(api, api->GetSymbolicDimensions(info, symbols, rank))) return;
  for (size_t j = 0; j < rank; j++) {
    struct length *length = &known->lengths[spec->dims[j]];
    if (length->value >= 0) continue;
    if (values[j] >= 0)
      *length = (struct length){values[j], ""};
    else if (!length->symbol && symbols[j] && symbols[j][0])
      length->symbol = symbols[j];
  }
}

static void learn_from_attr(const OrtApi *api, const OrtShapeInferContext *context, const struct attr_spec *spec,
                            struct knowledge *known) {
  const OrtOpAttr *attr = NULL;
  int64_t value;
  size_t size;
  if (spec->dim < 0 || !ok(api, api->ShapeInferContext_GetAttribute(context, spec->name, &attr)) || !attr) return;
  if (!ok(api, api->ReadOpAttr(attr, ORT_ATTRIBUTE_INT, &value, sizeof value, &size))) return;
  if (value >= dsa_dims[spec->dim].minimum && value <= dsa_dims[spec->dim].maximum)
    known->lengths[spec->dim] = (struct length){value, ""};
}

static void set_output(const OrtApi *api, const OrtShapeInferContext *context, const struct tensor_spec *spec, size_t i,
                       const struct knowledge *known) {
  int type = spec->dtype >= 0 ? dsa_dtypes[spec->dtype].onnx : known->types[-1 - spec->dtype];
  int64_t values[MAX_NDIM];
  const char *symbols[MAX_NDIM];
  size_t rank = (size_t)spec->ndim;
  if (!type) return;
  for (size_t j = 0; j < rank; j++) {
    const struct length *length = &known->lengths[spec->dims[j]];
    /* The interface cannot express "unknown", and a new symbol might already have another meaning in the model. */
    if (length->value < 0 && !length->symbol) return;
    values[j] = length->value;
    symbols[j] = length->symbol;
  }
  OrtTensorTypeAndShapeInfo *info;
  if (!ok(api, api->CreateTensorTypeAndShapeInfo(&info))) return;
  if (ok(api, api->SetTensorElementType(info, type)) && ok(api, api->SetDimensions(info, values, rank)) &&
      ok(api, api->SetSymbolicDimensions(info, symbols, rank)))
    ok(api, api->ShapeInferContext_SetOutputTypeShape(context, i, info));
  api->ReleaseTensorTypeAndShapeInfo(info);
}

static OrtStatus *infer_shapes(const OrtCustomOp *op, OrtShapeInferContext *context) {
  const struct op_spec *spec = op_of(op)->spec;
  const OrtApi *api = op_of(op)->runtime->api;
  struct knowledge known = {0};
  size_t count = 0;
  for (int d = 0; d < NUM_DIMS; d++) known.lengths[d].value = -1;
  if (!ok(api, api->ShapeInferContext_GetInputCount(context, &count))) return NULL;
  for (size_t i = 0; i < count && i < (size_t)spec->num_inputs; i++)
    learn_from_input(api, context, &spec->inputs[i], i, &known);
  for (int i = 0; i < spec->num_attrs; i++) learn_from_attr(api, context, &spec->attrs[i], &known);
  for (int i = 0; i < spec->num_outputs; i++) set_output(api, context, &spec->outputs[i], (size_t)i, &known);
  return NULL;
}

/* ONNX Runtime does not tell for which operator it asks for the pairs. */
static size_t first_in_first(int **inputs, int **outputs) {
  static int first;
  *inputs = *outputs = &first;
  return 1;
}

static void release_nothing(int *inputs, int *outputs) { (void)inputs, (void)outputs; }

/* If the output may be an input, ONNX Runtime gives a node the same memory for both, provided that nobody else needs
 * the input and that the inferred shapes have one size. */
static void offer_in_place(OrtCustomOp *op, const struct op_spec *spec) {
  if (spec->outputs[0].may_be != 0) return;
  op->GetMayInplace = first_in_first;
  op->ReleaseMayInplace = release_nothing;
}

void dsa_ort_describe(struct ort_op *op, const struct ort_runtime *runtime, const struct op_spec *spec,
                      const int8_t *types, int on_gpu) {
  *op = (struct ort_op){
      .base = {.version = ORT_CUSTOM_OP_VERSION,
               .GetName = name,
               .GetExecutionProviderType = provider,
               .GetInputType = input_type,
               .GetInputTypeCount = num_inputs,
               .GetOutputType = output_type,
               .GetOutputTypeCount = num_outputs,
               .GetInputCharacteristic = input_kind,
               .GetOutputCharacteristic = output_kind,
               .GetInputMemoryType = memory_type,
               .GetVariadicInputMinArity = one,
               .GetVariadicInputHomogeneity = one,
               .GetVariadicOutputMinArity = one,
               .GetVariadicOutputHomogeneity = one,
               .InferOutputShapeFn = runtime->minor >= MINOR_WITH_SAFE_INFERENCE ? infer_shapes : NULL,
               .GetStartVersion = one},
      .runtime = runtime,
      .spec = spec,
      .types = types,
      .on_gpu = on_gpu,
  };
  offer_in_place(&op->base, spec);
}
