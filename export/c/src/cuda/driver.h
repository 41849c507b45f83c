/* The CUDA driver: found when it is first needed, never linked. */
#ifndef DSA_TVM_CUDA_DRIVER_H_
#define DSA_TVM_CUDA_DRIVER_H_

#include "cuda/abi.h"

/* Its entry points, from the moment that dsa_cuda_find_driver returns NULL. */
struct cuda_driver {
#define POINTER(name, parameters) cu_result(*name) parameters;
  DSA_CUDA_DRIVER(POINTER)
#undef POINTER
};
extern struct cuda_driver dsa_cu;

/* NULL and the number of GPUs; or why there is nothing to call. */
const char *dsa_cuda_find_driver(int *num_devices);

/* An error in words. */
const char *dsa_cuda_error(cu_result error);

#endif
