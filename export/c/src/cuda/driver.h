/* The CUDA driver. It is found when it is first needed, and never linked. */
#ifndef DSA_TVM_CUDA_DRIVER_H_
#define DSA_TVM_CUDA_DRIVER_H_

#include "cuda/abi.h"

/* Its entry points. They are valid once dsa_cuda_find_driver has returned NULL. */
struct cuda_driver {
#define POINTER(name, parameters) cu_result(*name) parameters;
  DSA_CUDA_DRIVER(POINTER)
#undef POINTER
};
extern struct cuda_driver dsa_cu;

/* Returns NULL and sets the number of GPUs, or returns the reason why the driver cannot be used. */
const char *dsa_cuda_find_driver(int *num_devices);

/* The description of an error. */
const char *dsa_cuda_error(cu_result error);

#endif
