/* Instructions that kernels use and that TensorIR cannot express. The tests compile the same kernels for the CPU with a
   model of these functions. So all PTX and all intrinsics are here, and nothing else. */
#pragma once

#include <math_constants.h>
#include <stdint.h>

/* Names of types that TVM writes. */
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

/* The single allocation of shared memory of a kernel. The launch decides its size. */
#define DSA_SHARED_POOL(name) extern __shared__ __align__(1024) unsigned char name[]

#define DSA_DEVICE __device__ __forceinline__

DSA_DEVICE unsigned dsa_shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/* Votes and shuffles of whole warps. */
DSA_DEVICE unsigned dsa_ballot(int predicate) { return __ballot_sync(0xFFFFFFFFu, predicate); }
template <typename T> DSA_DEVICE T dsa_shuffle(T x, int lane) { return __shfl_sync(0xFFFFFFFFu, x, lane); }
template <typename T> DSA_DEVICE T dsa_shuffle_xor(T x, int mask) { return __shfl_xor_sync(0xFFFFFFFFu, x, mask); }
/* Gets the value from `delta` lanes below. The lowest lanes keep their own. */
template <typename T> DSA_DEVICE T dsa_shuffle_up(T x, int delta) { return __shfl_up_sync(0xFFFFFFFFu, x, delta); }

DSA_DEVICE int dsa_count_bits(unsigned x) { return __popc(x); }

/* Relaxed. Returns the old value. `p` may be in shared or global memory. */
DSA_DEVICE int dsa_atomic_add(int *p, int x) { return atomicAdd(p, x); }

/* Waits for `threads` threads, in whole warps, at barrier `id` in 1..15. 0 is the barrier of the block. */
DSA_DEVICE void dsa_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Loads 16 aligned bytes of global memory that nobody writes while the kernel runs. */
DSA_DEVICE void dsa_load_128(void *to, const void *from) {
  unsigned *r = (unsigned *)to;
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(from));
}

/* Copies 16 aligned bytes from global to shared memory. They arrive by the wait for their group; zeros if not `valid`.
   */
DSA_DEVICE void dsa_cp_async_16(void *to, const void *from, int valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dsa_shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}

/* The same for 4 bytes. */
DSA_DEVICE void dsa_cp_async_4(void *to, const void *from, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dsa_shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}

DSA_DEVICE void dsa_cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until all but the last `pending` groups of this thread have arrived; `pending` is a constant, 0..7. Other
   threads see the bytes after a barrier. */
DSA_DEVICE void dsa_cp_async_wait(int pending) {
  switch (pending) {
    case 1: asm volatile("cp.async.wait_group 1;" ::: "memory"); break;
    case 2: asm volatile("cp.async.wait_group 2;" ::: "memory"); break;
    case 3: asm volatile("cp.async.wait_group 3;" ::: "memory"); break;
    case 4: asm volatile("cp.async.wait_group 4;" ::: "memory"); break;
    case 5: asm volatile("cp.async.wait_group 5;" ::: "memory"); break;
    case 6: asm volatile("cp.async.wait_group 6;" ::: "memory"); break;
    case 7: asm volatile("cp.async.wait_group 7;" ::: "memory"); break;
    default: asm volatile("cp.async.wait_group 0;" ::: "memory");
  }
}

/* Four 8 x 8 matrices of 16 bit elements: lane l names row l % 8 of matrix l / 8, 16 aligned bytes, and gets from each
   matrix elements 2 (l % 4) and the next of row l / 4. */
DSA_DEVICE void dsa_ldmatrix_x4(unsigned *r, const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(dsa_shared_address(row))
               : "memory");
}

/* The same, with the matrices transposed. */
DSA_DEVICE void dsa_ldmatrix_x4_trans(unsigned *r, const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(dsa_shared_address(row))
               : "memory");
}

/* c[16 x 8] += a[16 x K] b[K x 8]. With g = lane / 4, t = lane % 4 and E elements to a register: a[0] holds row g from
   column E t on, a[1] row g + 8, a[2] and a[3] the same rows K / 2 columns on; b[0] column g from row E t on, b[1] K /
   2 rows on; c[0], c[1] row g, columns 2 t and the next, c[2], c[3] row g + 8. */
#define DSA_MMA(name, accumulator, constraint, instruction)                                                     \
  DSA_DEVICE void name(accumulator *c, const unsigned *a, const unsigned *b) {                                  \
    asm volatile(instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                 \
                 : "+" constraint(c[0]), "+" constraint(c[1]), "+" constraint(c[2]), "+" constraint(c[3])       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                           \
  }
DSA_MMA(dsa_mma_bf16, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32")
DSA_MMA(dsa_mma_f16, float, "f", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32")
DSA_MMA(dsa_mma_s8, int, "r", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32")
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
DSA_MMA(dsa_mma_e4m3, float, "f", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32")
#endif
#undef DSA_MMA

/* Two f32 rounded to nearest even, `low` in the low half. */
DSA_DEVICE unsigned dsa_pack_bf16(float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DSA_DEVICE unsigned dsa_pack_f16(float low, float high) {
  unsigned r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

DSA_DEVICE float dsa_f16_to_f32(unsigned short x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x));
  return r;
}

DSA_DEVICE unsigned dsa_mul_f16x2(unsigned a, unsigned b) {
  unsigned r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

/* 2**x to about 2 units in the last place. Subnormal results become zero. */
DSA_DEVICE float dsa_exp2(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/* The larger number; NaN if either is NaN. */
DSA_DEVICE float dsa_max_nan(float x, float y) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  return r;
}

/* Two products, rounded to nearest even, also when subnormal. */
DSA_DEVICE unsigned dsa_mul_bf16x2(unsigned a, unsigned b) {
  unsigned r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  return r;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
/* Two e4m3 in the low half of `x` as two f16, exactly. */
#define DSA_HAS_E4M3 1
DSA_DEVICE unsigned dsa_cvt_e4m3x2(unsigned x) {
  unsigned r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(r) : "h"((unsigned short)x));
  return r;
}
#endif

/* The barrier of the block. It also tells whether the `predicate` of any thread is not 0. */
DSA_DEVICE int dsa_barrier_or(int predicate) { return __syncthreads_or(predicate) != 0; }

/* 1 / x to 1 unit in the last place; subnormals become zero. A division would be a call, which costs registers. */
DSA_DEVICE float dsa_reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
