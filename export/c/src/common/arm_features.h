/* Features of Arm CPUs beside the baseline of aarch64, from what Linux says of them (AT_HWCAP and AT_HWCAP2). */
#ifndef DSA_TVM_ARM_FEATURES_H_
#define DSA_TVM_ARM_FEATURES_H_

/* As the build names them. */
enum { ARM_DOTPROD = 1, ARM_I8MM = 2, ARM_BF16 = 4 };

static inline unsigned arm_dots(unsigned long hwcap, unsigned long hwcap2) {
  enum { ASIMDDP = 1 << 20 };
  enum { I8MM = 1 << 13, BF16 = 1 << 14 }; /* not those of SVE, which are bits 9 and 12 */
  return (hwcap & ASIMDDP ? ARM_DOTPROD : 0) | (hwcap2 & I8MM ? ARM_I8MM : 0) | (hwcap2 & BF16 ? ARM_BF16 : 0);
}

#endif
