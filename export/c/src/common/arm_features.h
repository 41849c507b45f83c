/* Features of Arm CPUs beside the baseline of aarch64, from what Linux says of them (AT_HWCAP). */
#ifndef DSA_TVM_ARM_FEATURES_H_
#define DSA_TVM_ARM_FEATURES_H_

/* As the build names them. */
enum { ARM_DOTPROD = 1 };

static inline unsigned arm_dots(unsigned long hwcap) {
  enum { ASIMDDP = 1 << 20 };
  return hwcap & ASIMDDP ? ARM_DOTPROD : 0;
}

#endif
