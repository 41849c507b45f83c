/* The floating-point mode that everything is computed in: round to nearest, denormal numbers kept, no traps. Callers may
 * have another one, each of their threads its own, and results must not depend on it. */
#ifndef DSA_TVM_FLOAT_MODE_H_
#define DSA_TVM_FLOAT_MODE_H_

#if defined(__x86_64__)
#include <xmmintrin.h>

struct dsa_float_mode {
  unsigned int mxcsr;
};

static inline struct dsa_float_mode dsa_enter_float_mode(void) {
  struct dsa_float_mode before = {_mm_getcsr()};
  _mm_setcsr(0x1f80); /* all exceptions masked, and no other bit */
  return before;
}

/* The caller's flags come back with its mode: what a kernel raised is not seen. */
static inline void dsa_leave_float_mode(struct dsa_float_mode before) { _mm_setcsr(before.mxcsr); }

#elif defined(__aarch64__)
#include <stdint.h>

struct dsa_float_mode {
  uint64_t fpcr, fpsr;
};

static inline struct dsa_float_mode dsa_enter_float_mode(void) {
  struct dsa_float_mode before;
  __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(before.fpcr), "=r"(before.fpsr)::"memory");
  __asm__ volatile("msr fpcr, xzr" ::: "memory");
  return before;
}

static inline void dsa_leave_float_mode(struct dsa_float_mode before) {
  __asm__ volatile("msr fpcr, %0\n\tmsr fpsr, %1" ::"r"(before.fpcr), "r"(before.fpsr) : "memory");
}

#else
#include <fenv.h>

struct dsa_float_mode {
  fenv_t environment;
};

static inline struct dsa_float_mode dsa_enter_float_mode(void) {
  struct dsa_float_mode before;
  fegetenv(&before.environment);
  fesetenv(FE_DFL_ENV);
  return before;
}

static inline void dsa_leave_float_mode(struct dsa_float_mode before) { fesetenv(&before.environment); }
#endif

#endif
