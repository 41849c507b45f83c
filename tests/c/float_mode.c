/* The calling thread's floating-point mode, for tests that change it. */
#define _GNU_SOURCE
#include <fenv.h>
#include <stdint.h>

/* 0: the default; 1..3: other roundings; 4: denormal numbers as zeros; 5: traps. */
void set_mode(int mode) {
  static const int roundings[] = {FE_TONEAREST, FE_UPWARD, FE_DOWNWARD, FE_TOWARDZERO};
  fesetenv(FE_DFL_ENV);
  if (mode < 4) fesetround(roundings[mode]);
#if defined(__x86_64__)
  unsigned mxcsr = __builtin_ia32_stmxcsr();
  if (mode == 4) __builtin_ia32_ldmxcsr(mxcsr | 0x8040);
#elif defined(__aarch64__)
  uint64_t fpcr;
  __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
  if (mode == 4) __asm__ volatile("msr fpcr, %0" ::"r"(fpcr | 1 << 24));
#endif
  if (mode == 5) feenableexcept(FE_DIVBYZERO | FE_INVALID | FE_OVERFLOW | FE_UNDERFLOW | FE_INEXACT);
}

/* The mode and the flags that have been raised. */
uint64_t get_mode(void) {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr();
#elif defined(__aarch64__)
  uint64_t fpcr, fpsr;
  __asm__ volatile("mrs %0, fpcr\n\tmrs %1, fpsr" : "=r"(fpcr), "=r"(fpsr));
  return fpcr << 32 | fpsr;
#else
  return (uint64_t)fegetround();
#endif
}
