/* Instructions that only sm_90a has: asynchronous copies that count bytes at barriers in shared memory, and products of
   warpgroups. A warpgroup is four warps that begin at a multiple of 128 threads. primitives.cuh is included first. */
#pragma once

/* Rank, address, lengths and swizzle of a matrix in global memory, as the driver encodes them. */
struct alignas(64) CUtensorMap {
  unsigned long long opaque[16];
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

/* A barrier of 8 bytes in shared memory. A phase ends after `count` arrivals, when all announced bytes have come too.
   */
DSA_DEVICE void dsa_mbarrier_init(void *barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(dsa_shared_address(barrier)), "r"(count) : "memory");
}

/* Call it in the thread that has initialized barriers, before the block's barrier that lets others use them. */
DSA_DEVICE void dsa_mbarrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DSA_DEVICE void dsa_mbarrier_arrive(void *barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(dsa_shared_address(barrier)) : "memory");
}

/* Announces the bytes that copies will bring to this barrier, and arrives. */
DSA_DEVICE void dsa_mbarrier_expect(void *barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(dsa_shared_address(barrier)), "r"(bytes)
               : "memory");
}

/* Waits until the phase of that parity has ended: 0 for the first, the third, and so on. At first, 1 does not wait. */
DSA_DEVICE void dsa_mbarrier_wait(void *barrier, int parity) {
  asm volatile(
      "{\n.reg .pred ended;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n@!ended bra again;\n}" ::"r"(
          dsa_shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/* Orders writes of threads to shared memory, also by cp.async, before reads by wgmma or writes by bulk copies. The
   writer calls it before it arrives, or the reader after it has waited. */
DSA_DEVICE void dsa_fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Arrives as soon as all earlier cp.async of this thread have landed. It counts as one arrival. */
DSA_DEVICE void dsa_cp_async_arrive(void *barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(dsa_shared_address(barrier)) : "memory");
}

/* Copies a box of the tensor. Coordinates are in elements, the innermost first. Outside are zeros. For one thread. */
DSA_DEVICE void dsa_tma_load_2d(void *to, const CUtensorMap &map, void *barrier, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
               ::"r"(dsa_shared_address(to)), "l"(&map), "r"(dsa_shared_address(barrier)), "r"(x), "r"(y)
               : "memory");
}
DSA_DEVICE void dsa_tma_load_3d(void *to, const CUtensorMap &map, void *barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          dsa_shared_address(to)),
      "l"(&map), "r"(dsa_shared_address(barrier)), "r"(x), "r"(y), "r"(z)
      : "memory");
}
DSA_DEVICE void dsa_tma_prefetch(const CUtensorMap &map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

/* Fetches the 128 bytes around an address of global memory into the L2 cache, for a later load. */
DSA_DEVICE void dsa_prefetch(const void *from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

/* Arrives at a barrier where others wait with dsa_barrier; `threads` counts both. */
DSA_DEVICE void dsa_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Change the registers that each thread of the warpgroup has from here on, to a multiple of 8 in 24..256. */
template <int N> DSA_DEVICE void dsa_more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DSA_DEVICE void dsa_fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

/* Call it before the first of some products: it orders earlier writes to their registers. */
DSA_DEVICE void dsa_wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DSA_DEVICE void dsa_wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Waits until all but the last `PENDING` groups are complete. Their sums can then be read and their operands reused. */
template <int PENDING> DSA_DEVICE void dsa_wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* Keeps the compiler from moving reads and writes of registers across this point. Needed after the wait for sums, and
   between the writes of values and the product that uses them. */
template <int COUNT> DSA_DEVICE void dsa_wgmma_hold(float *registers) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int COUNT> DSA_DEVICE void dsa_wgmma_hold(unsigned *registers) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(registers[i])::"memory");
}

/* The same for addresses, so that they are not computed again at each use. */
template <int COUNT> DSA_DEVICE void dsa_hold_64(int64_t *registers) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+l"(registers[i]));
}

/* Where an operand lies in shared memory. `SWIZZLE` is the bytes to a row of its pattern, 128, 64 or 32: of 8 rows, row
   r has its 16 bytes number c at c ^ r (c ^ r / 2, c ^ r / 4), and 8 * SWIZZLE bytes, so aligned, are a tile. K-major:
   rows are M or N, `stride` bytes lie between a tile and that of the next 8 rows, `leading` means nothing; the next 32
   bytes of K are 2 further on in the descriptor. MN-major: rows are K, `stride` between a tile and that of the next 8
   of K, `leading` to that of the next SWIZZLE / 2 elements of N; the next 16 of K are `stride / 8` further on. */
template <int SWIZZLE> DSA_DEVICE uint64_t dsa_descriptor(const void *p, int leading, int stride) {
  static_assert(SWIZZLE == 128 || SWIZZLE == 64 || SWIZZLE == 32, "no such swizzle");
  uint64_t mode = SWIZZLE == 128 ? 1 : SWIZZLE == 64 ? 2 : 3;
  return mode << 62 | (uint64_t)(stride >> 4) << 32 | (uint64_t)(leading >> 4) << 16 |
         (dsa_shared_address(p) & 0x3FFFF) >> 4;
}

#define DSA_S16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DSA_S32 DSA_S16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSA_S64                                                                                                   \
  DSA_S32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51," \
          "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSA_S128                                                                                                  \
  DSA_S64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83," \
          "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102,"     \
          "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119," \
          "%120, %121, %122, %123, %124, %125, %126, %127"
#define DSA_F4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define DSA_F16(i) DSA_F4(i), DSA_F4(i + 4), DSA_F4(i + 8), DSA_F4(i + 12)
#define DSA_F32(i) DSA_F16(i), DSA_F16(i + 16)
#define DSA_F64(i) DSA_F32(i), DSA_F32(i + 32)
#define DSA_F128(i) DSA_F64(i), DSA_F64(i + 64)

/* c[64 x N] += a b, or = a b if not `accumulate`. Warp w of the warpgroup has rows 16 w and following, in which, with g
   = lane / 4 and t = lane % 4, c[4 j + e] is row g + e / 2 * 8, column 8 j + 2 t + e % 2. N is 32, 64, 128 or 256, K is
   32 bytes. What is read of c, or written to it, between here and the wait is undefined. */
#define DSA_WGMMA(n, r, k, type, first, second, predicate, tail, ...)                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " predicate ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k" #k \
               ".f32." type "." type " {" DSA_S##r "}, " first ", " second ", p, 1, 1" tail ";\n}"               \
               : DSA_F##r(0)                                                                                     \
               : __VA_ARGS__, "l"(b), "r"(accumulate))
/* Operands from shared memory, or `a` from registers with the rows of mma.m16n8k16. Their numbers follow those of c. */
#define DSA_WGMMA_K32(n, r, type, w, x, y, z, u, v) DSA_WGMMA(n, r, 32, type, w, x, y, "", "l"(a))
#define DSA_WGMMA_K16(n, r, type, w, x, y, z, u, v)                                         \
  if constexpr (MN_MAJOR)                                                                   \
    DSA_WGMMA(n, r, 16, type, w, x, y, ", 0, 1", "l"(a));                                   \
  else                                                                                      \
    DSA_WGMMA(n, r, 16, type, w, x, y, ", 0, 0", "l"(a))
#define DSA_WGMMA_K16_REGISTERS(n, r, type, w, x, y, z, u, v)                               \
  if constexpr (MN_MAJOR)                                                                   \
    DSA_WGMMA(n, r, 16, type, "{" w ", " x ", " y ", " z "}", u, v, ", 1", DSA_WGMMA_A);    \
  else                                                                                      \
    DSA_WGMMA(n, r, 16, type, "{" w ", " x ", " y ", " z "}", u, v, ", 0", DSA_WGMMA_A)
#define DSA_WGMMA_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define DSA_WGMMA_OF(product, type)                                           \
  static_assert(N == 32 || N == 64 || N == 128 || N == 256, "no such product"); \
  if constexpr (N == 32) {                                                    \
    product(32, 16, type, "%16", "%17", "%18", "%19", "%20", "%21");          \
  } else if constexpr (N == 64) {                                             \
    product(64, 32, type, "%32", "%33", "%34", "%35", "%36", "%37");          \
  } else if constexpr (N == 128) {                                            \
    product(128, 64, type, "%64", "%65", "%66", "%67", "%68", "%69");         \
  } else {                                                                    \
    product(256, 128, type, "%128", "%129", "%130", "%131", "%132", "%133");  \
  }
#define DSA_WGMMA_16_BITS(type)                                                                                   \
  template <int N, int MN_MAJOR> DSA_DEVICE void dsa_wgmma_##type(float *c, uint64_t a, uint64_t b, int accumulate) { \
    DSA_WGMMA_OF(DSA_WGMMA_K16, #type)                                                                            \
  }                                                                                                               \
  template <int N, int MN_MAJOR>                                                                                  \
  DSA_DEVICE void dsa_wgmma_##type(float *c, const unsigned *a, uint64_t b, int accumulate) {                     \
    DSA_WGMMA_OF(DSA_WGMMA_K16_REGISTERS, #type)                                                                  \
  }
DSA_WGMMA_16_BITS(bf16)
DSA_WGMMA_16_BITS(f16)
template <int N> DSA_DEVICE void dsa_wgmma_e4m3(float *c, uint64_t a, uint64_t b, int accumulate) {
  DSA_WGMMA_OF(DSA_WGMMA_K32, "e4m3")
}

#endif
