/* Workspaces in the order of a stream: what one call gives back, the driver gives to whoever is enqueued behind it. */
#include "cuda/pool.h"

#include <pthread.h>

#include "cuda/driver.h"

static cu_memory_pool pools[MAX_DEVICES];
static pthread_mutex_t pools_lock = PTHREAD_MUTEX_INITIALIZER;

/* Makes a pool of our own, which keeps its memory. The default pool of the device is shared with others, and releases
 * free memory whenever somebody waits for the GPU. */
static cu_result make_pool(int ordinal, cu_memory_pool *made) {
  struct cuda_pool_properties properties = {
      .allocation = CU_MEM_ALLOCATION_TYPE_PINNED, .location = CU_MEM_LOCATION_TYPE_DEVICE, .ordinal = ordinal};
  uint64_t kept = UINT64_MAX;
  cu_memory_pool pool = NULL;
  cu_device device;
  int supported = 0;
  cu_result error = dsa_cu.cuDeviceGet(&device, ordinal);
  if (!error) error = dsa_cu.cuDeviceGetAttribute(&supported, CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, device);
  if (!error && !supported) error = CU_NOT_SUPPORTED;
  if (!error) error = dsa_cu.cuMemPoolCreate(&pool, &properties);
  if (error) return error;
  error = dsa_cu.cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &kept);
  if (error)
    dsa_cu.cuMemPoolDestroy(pool);
  else
    *made = pool;
  return error;
}

dsa_tvm_status dsa_cuda_pool_take(const struct cuda_call *call, uint64_t bytes, uint64_t *address) {
  int ordinal = call->call->device_id;
  pthread_mutex_lock(&pools_lock);
  cu_result error = pools[ordinal] ? 0 : make_pool(ordinal, &pools[ordinal]);
  pthread_mutex_unlock(&pools_lock);
  if (!error) error = dsa_cu.cuMemAllocFromPoolAsync(address, bytes, pools[ordinal], (cu_stream)call->stream);
  if (!error) return DSA_TVM_OK;
  *address = 0;
  return dsa_fail(error == CU_NOT_SUPPORTED ? DSA_TVM_UNSUPPORTED : DSA_TVM_OUT_OF_MEMORY,
                  "%s: workspace: expected %llu bytes of memory on CUDA device %d, got none: %s", call->call->op->name,
                  (unsigned long long)bytes, ordinal, dsa_cuda_error(error));
}

void dsa_cuda_pool_give_back(const struct cuda_call *call, uint64_t address) {
  dsa_cu.cuMemFreeAsync(address, (cu_stream)call->stream);
}
