/* The levels of the x86-64 psABI, and dot products, from what CPUID and XGETBV say. A compiler may use every instruction
 * of a level, so all of its features are looked at: a hypervisor may mask any of them. */
#ifndef DSA_TVM_X86_LEVEL_H_
#define DSA_TVM_X86_LEVEL_H_

#include <stdint.h>

struct x86_features {
  uint32_t ecx_1, ebx_7, ecx_80000001; /* of CPUID's leaves; 0 where there is no such leaf */
  uint32_t xcr0;                       /* the registers that the system saves; 0 without XGETBV */
  uint32_t eax_7_1;                    /* of leaf 7, subleaf 1 */
  uint32_t ecx_7, edx_7;
};

static inline int x86_has(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

/* 1..4 */
static inline int x86_level(const struct x86_features *f) {
  enum { SSE3 = 1 << 0, SSSE3 = 1 << 9, FMA = 1 << 12, CX16 = 1 << 13, SSE4_1 = 1 << 19, SSE4_2 = 1 << 20 };
  enum { MOVBE = 1 << 22, POPCNT = 1 << 23, OSXSAVE = 1 << 27, AVX = 1 << 28, F16C = 1 << 29 };
  enum { BMI1 = 1 << 3, AVX2 = 1 << 5, BMI2 = 1 << 8 };
  enum { AVX512F = 1 << 16, AVX512DQ = 1 << 17, AVX512CD = 1 << 28, AVX512BW = 1 << 30 };
  const uint32_t AVX512VL = 1u << 31;
  enum { LAHF = 1 << 0, LZCNT = 1 << 5 };
  enum { XMM_YMM = 0x6, OPMASK_ZMM = 0xe0 };
  if (!x86_has(f->ecx_1, SSE3 | SSSE3 | CX16 | SSE4_1 | SSE4_2 | POPCNT) || !x86_has(f->ecx_80000001, LAHF)) return 1;
  if (!x86_has(f->ecx_1, FMA | MOVBE | OSXSAVE | AVX | F16C) || !x86_has(f->ebx_7, BMI1 | AVX2 | BMI2) ||
      !x86_has(f->ecx_80000001, LZCNT) || !x86_has(f->xcr0, XMM_YMM))
    return 2;
  if (!x86_has(f->ebx_7, AVX512F | AVX512DQ | AVX512CD | AVX512BW | AVX512VL) ||
      !x86_has(f->xcr0, XMM_YMM | OPMASK_ZMM))
    return 3;
  return 4;
}

/* The features beside the levels that targets need, as the build names them. */
enum { X86_AVXVNNI = 1, X86_AVX512VNNI = 2, X86_AVX512BF16 = 4, X86_AMX_TILE = 8, X86_AMX_BF16 = 16, X86_AMX_INT8 = 32 };

/* Those of the CPU. They are useful with the registers of levels 3, 4 and 4, and those of AMX with tiles that the system
 * saves. */
static inline unsigned x86_dots(const struct x86_features *f) {
  enum { TILES = 1 << 17 | 1 << 18 };
  const unsigned amx = (x86_has(f->edx_7, 1 << 24) ? X86_AMX_TILE : 0) |
                       (x86_has(f->edx_7, 1 << 22) ? X86_AMX_BF16 : 0) |
                       (x86_has(f->edx_7, 1 << 25) ? X86_AMX_INT8 : 0);
  return (x86_has(f->xcr0, TILES) ? amx : 0) | (x86_has(f->eax_7_1, 1 << 4) ? X86_AVXVNNI : 0) |
         (x86_has(f->ecx_7, 1 << 11) ? X86_AVX512VNNI : 0) | (x86_has(f->eax_7_1, 1 << 5) ? X86_AVX512BF16 : 0);
}

#if defined(__x86_64__)
#include <cpuid.h>

static inline struct x86_features x86_features_here(void) {
  struct x86_features f = {0};
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d)) f.ecx_1 = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.ebx_7 = b;
    f.ecx_7 = c;
    f.edx_7 = d;
    if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.eax_7_1 = a;
  }
  if (__get_cpuid(0x80000001, &a, &b, &c, &d)) f.ecx_80000001 = c;
  if (f.ecx_1 & 1u << 27) __asm__ volatile("xgetbv" : "=a"(f.xcr0), "=d"(d) : "c"(0));
  return f;
}
#endif

#endif
