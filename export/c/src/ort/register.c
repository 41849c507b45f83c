/* The entry point for ONNX Runtime: registers every operator, for all its element types, in the domain ai.dsa. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "ort/ort.h"

#define DOMAIN "ai.dsa"

enum { OLDEST_MINOR = 18 };

static OrtStatus *add_operators(struct ort_runtime *runtime) {
  const OrtApi *api = runtime->api;
  size_t count = 0;
  for (int i = 0; i < NUM_OPS; i++) count += (size_t)((1 + dsa_has_cuda) * dsa_ops[i].num_variants);
  runtime->ops = calloc(count, sizeof *runtime->ops);
  if (!runtime->ops) return dsa_ort_status(api, dsa_fail(DSA_TVM_OUT_OF_MEMORY, "no memory for the operators"));
  OrtStatus *status = api->CreateCustomOpDomain(DOMAIN, &runtime->domain);
  struct ort_op *op = runtime->ops;
  for (int on_gpu = 0; on_gpu <= dsa_has_cuda; on_gpu++)
    for (int i = 0; i < NUM_OPS; i++)
      for (int v = 0; v < dsa_ops[i].num_variants && !status; v++, op++) {
        dsa_ort_describe(op, runtime, &dsa_ops[i], dsa_ops[i].variants[v], on_gpu);
        op->base.CreateKernelV2 = dsa_ort_create_kernel;
        op->base.KernelComputeV2 = dsa_ort_compute;
        op->base.KernelDestroy = free;
        status = api->CustomOpDomain_Add(runtime->domain, &op->base);
      }
  return status;
}

/* One domain for each ONNX Runtime in the process. It is never freed, because sessions keep pointers into it. */
static OrtStatus *domain_of(const OrtApi *api, int minor, OrtCustomOpDomain **domain) {
  static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  static struct ort_runtime *runtimes;
  OrtStatus *status = NULL;
  struct ort_runtime *runtime;
  pthread_mutex_lock(&mutex);
  for (runtime = runtimes; runtime && runtime->api != api; runtime = runtime->next) continue;
  if (!runtime) {
    runtime = calloc(1, sizeof *runtime);
    if (runtime) {
      *runtime = (struct ort_runtime){.api = api, .minor = minor, .next = runtimes};
      status = add_operators(runtime);
    } else {
      status = dsa_ort_status(api, dsa_fail(DSA_TVM_OUT_OF_MEMORY, "no memory for the operators"));
    }
    if (!status) {
      runtimes = runtime;
    } else if (runtime) {
      if (runtime->domain) api->ReleaseCustomOpDomain(runtime->domain);
      free(runtime->ops);
      free(runtime);
    }
  }
  if (!status) *domain = runtime->domain;
  pthread_mutex_unlock(&mutex);
  return status;
}

/* SessionOptions.register_custom_ops_library calls this function. */
DSA_TVM_API OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
  int major = 0, minor = 0;
  const char *version = base->GetVersionString();
  sscanf(version, "%d.%d", &major, &minor);
  /* Read the version first: asking for an interface that is too new prints a warning. */
  const OrtApi *api = base->GetApi(1);
  if (!api) return NULL; /* another major version: there is no interface to report an error with */
  if (major != 1 || minor < OLDEST_MINOR) {
    dsa_fail(DSA_TVM_UNSUPPORTED, "dsa_tvm: expected ONNX Runtime 1.%d or a newer 1.x, got %s", OLDEST_MINOR, version);
    return dsa_ort_status(api, DSA_TVM_UNSUPPORTED);
  }
  api = base->GetApi(minor >= MINOR_WITH_BORROWED_SHAPES ? MINOR_WITH_BORROWED_SHAPES : OLDEST_MINOR);
  OrtCustomOpDomain *domain;
  OrtStatus *status = domain_of(api, minor, &domain);
  return status ? status : api->AddCustomOpDomain(options, domain);
}
