/* The part of ONNX Runtime's C interface that is used here. ONNX Runtime ships no C headers in its Python packages, and
 * the interface is frozen: functions are only ever added behind the last one, so a slot's number names it for good. */
#ifndef DSA_TVM_ORT_ABI_H_
#define DSA_TVM_ORT_ABI_H_

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtOpAttr OrtOpAttr;
typedef struct OrtCustomOp OrtCustomOp;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtAllocator OrtAllocator;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9 };
enum { ORT_ARGUMENT_REQUIRED = 0, ORT_ARGUMENT_OPTIONAL = 1 };
enum { ORT_MEMORY_DEFAULT = 0 };
enum { ORT_ATTRIBUTE_INT = 1 };
/* With the names that ONNX Runtime's own header has, because a program may be compiled with either. */
enum { ORT_API_VERSION = 18, ORT_LOGGING_LEVEL_WARNING = 2, OrtDeviceAllocator = 0, OrtMemTypeDefault = 0 };
enum { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7 };

/* The table of functions; each member stands at its slot. */
#define ORT_SLOT(number, declaration)      \
  struct {                                 \
    void (*before_##number[number])(void); \
    declaration;                           \
  }
typedef union OrtApi {
  OrtStatus *(*CreateStatus)(int code, const char *message); /* slot 0 */
  ORT_SLOT(2, const char *(*GetErrorMessage)(const OrtStatus *));
  ORT_SLOT(3, OrtStatus *(*CreateEnv)(int level, const char *name, OrtEnv **));
  ORT_SLOT(7, OrtStatus *(*CreateSession)(const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **));
  ORT_SLOT(9, OrtStatus *(*Run)(OrtSession *, const OrtRunOptions *, const char *const *input_names,
                                const OrtValue *const *inputs, size_t, const char *const *output_names, size_t,
                                OrtValue **outputs));
  ORT_SLOT(10, OrtStatus *(*CreateSessionOptions)(OrtSessionOptions **));
  ORT_SLOT(26, OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **));
  ORT_SLOT(27, OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *, const OrtCustomOp *));
  ORT_SLOT(28, OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *, OrtCustomOpDomain *));
  ORT_SLOT(29, OrtStatus *(*RegisterCustomOpsLibrary)(OrtSessionOptions *, const char *path, void **handle));
  ORT_SLOT(30, OrtStatus *(*SessionGetInputCount)(const OrtSession *, size_t *));
  ORT_SLOT(33, OrtStatus *(*SessionGetInputTypeInfo)(const OrtSession *, size_t, OrtTypeInfo **));
  ORT_SLOT(36, OrtStatus *(*SessionGetInputName)(const OrtSession *, size_t, OrtAllocator *, char **));
  ORT_SLOT(49, OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *, void *, size_t bytes,
                                                            const int64_t *shape, size_t, int type, OrtValue **));
  ORT_SLOT(51, OrtStatus *(*GetTensorMutableData)(OrtValue *, void **));
  ORT_SLOT(55, OrtStatus *(*CastTypeInfoToTensorInfo)(const OrtTypeInfo *,
                                                      const OrtTensorTypeAndShapeInfo **)); /* borrowed */
  ORT_SLOT(57, OrtStatus *(*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo **));
  ORT_SLOT(58, OrtStatus *(*SetTensorElementType)(OrtTensorTypeAndShapeInfo *, int));
  ORT_SLOT(59, OrtStatus *(*SetDimensions)(OrtTensorTypeAndShapeInfo *, const int64_t *, size_t));
  ORT_SLOT(60, OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *, int *));
  ORT_SLOT(61, OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *, size_t *));
  ORT_SLOT(62, OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *, int64_t *, size_t));
  ORT_SLOT(63, OrtStatus *(*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo *, const char **, size_t));
  ORT_SLOT(65, OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *, OrtTensorTypeAndShapeInfo **));
  ORT_SLOT(69, OrtStatus *(*CreateCpuMemoryInfo)(int allocator, int memory, OrtMemoryInfo **));
  ORT_SLOT(72, OrtStatus *(*MemoryInfoGetId)(const OrtMemoryInfo *, int *));
  ORT_SLOT(78, OrtStatus *(*GetAllocatorWithDefaultOptions)(OrtAllocator **)); /* borrowed */
  ORT_SLOT(85, OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *, const char *name, float *));
  ORT_SLOT(86, OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *, const char *name, int64_t *));
  ORT_SLOT(88, OrtStatus *(*KernelContext_GetInputCount)(const OrtKernelContext *, size_t *));
  ORT_SLOT(90, OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *, size_t, const OrtValue **));
  ORT_SLOT(91, OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *, size_t, const int64_t *, size_t, OrtValue **));
  ORT_SLOT(93, void (*ReleaseStatus)(OrtStatus *));
  ORT_SLOT(95, void (*ReleaseSession)(OrtSession *));
  ORT_SLOT(96, void (*ReleaseValue)(OrtValue *));
  ORT_SLOT(98, void (*ReleaseTypeInfo)(OrtTypeInfo *));
  ORT_SLOT(99, void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *));
  ORT_SLOT(101, void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *));
  ORT_SLOT(193, OrtStatus *(*KernelContext_GetGPUComputeStream)(const OrtKernelContext *, void **));
  ORT_SLOT(194, OrtStatus *(*GetTensorMemoryInfo)(const OrtValue *, const OrtMemoryInfo **)); /* borrowed */
  ORT_SLOT(267, OrtStatus *(*ShapeInferContext_GetInputCount)(const OrtShapeInferContext *, size_t *));
  ORT_SLOT(268, OrtStatus *(*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext *, size_t,
                                                                  OrtTensorTypeAndShapeInfo **)); /* borrowed */
  ORT_SLOT(269, OrtStatus *(*ShapeInferContext_GetAttribute)(const OrtShapeInferContext *, const char *name,
                                                             const OrtOpAttr **));
  ORT_SLOT(270, OrtStatus *(*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext *, size_t,
                                                                   const OrtTensorTypeAndShapeInfo *));
  ORT_SLOT(271, OrtStatus *(*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo *, const char **, size_t));
  ORT_SLOT(272, OrtStatus *(*ReadOpAttr)(const OrtOpAttr *, int kind, void *, size_t, size_t *));
  ORT_SLOT(274, OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *, void (*task)(void *, size_t),
                                                        size_t count, size_t batches, void *));
  ORT_SLOT(414, OrtStatus *(*GetTensorElementTypeAndShapeDataReference)(const OrtValue *, int *, const int64_t **,
                                                                        size_t *)); /* since 1.24; borrowed */
} OrtApi;

typedef struct OrtApiBase {
  const OrtApi *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)(void);
} OrtApiBase;

/* What an operator tells ONNX Runtime of itself, as version 18 of the interface has it. */
enum { ORT_CUSTOM_OP_VERSION = 18 };
struct OrtCustomOp {
  uint32_t version;
  void *(*CreateKernel)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *);
  const char *(*GetName)(const OrtCustomOp *);
  const char *(*GetExecutionProviderType)(const OrtCustomOp *);
  int (*GetInputType)(const OrtCustomOp *, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp *);
  int (*GetOutputType)(const OrtCustomOp *, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp *);
  void (*KernelCompute)(void *, OrtKernelContext *);
  void (*KernelDestroy)(void *);
  int (*GetInputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetOutputCharacteristic)(const OrtCustomOp *, size_t);
  int (*GetInputMemoryType)(const OrtCustomOp *, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp *);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp *);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp *);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *);
  OrtStatus *(*CreateKernelV2)(const OrtCustomOp *, const OrtApi *, const OrtKernelInfo *, void **);
  OrtStatus *(*KernelComputeV2)(void *, OrtKernelContext *);
  OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *, OrtShapeInferContext *);
  int (*GetStartVersion)(const OrtCustomOp *);
  int (*GetEndVersion)(const OrtCustomOp *);
  size_t (*GetMayInplace)(int **, int **);
  void (*ReleaseMayInplace)(int *, int *);
  size_t (*GetAliasMap)(int **, int **);
  void (*ReleaseAliasMap)(int *, int *);
};

#endif
