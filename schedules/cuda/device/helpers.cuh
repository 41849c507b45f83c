/* Device functions of the kernels that need nothing but C++ and primitives.cuh, which is included first. */
#pragma once

/* The bits of four elements of `row` from `at` on, NaN where outside [low, high), which is never read. */
DSA_DEVICE void dsa_load_row4(unsigned *to, const float *row, int64_t at, int64_t low, int64_t high) {
  const float *from = row + at;
  if (at >= low && at + 4 <= high && ((uintptr_t)from & 15) == 0) {
    dsa_load_128(to, from);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) to[e] = at + e >= low && at + e < high ? ((const unsigned *)from)[e] : 0x7FFFFFFFu;
}

/* How many f32 lie between `p` and the 16 byte boundary before it. */
DSA_DEVICE int dsa_behind_16(const float *p) { return (int)((uintptr_t)p >> 2 & 3); }

/* 16 bytes to shared memory, asynchronously if `from` is aligned to 16 and at once if it is not. An element takes
   `width` bytes, to which `from` is aligned. Zeros where `valid` is 0, and then `from` is not read. */
DSA_DEVICE void dsa_copy_16(void *to, const void *from, int width, int valid) {
  if (((uintptr_t)from & 15) == 0 || !valid) {
    dsa_cp_async_16(to, from, valid);
  } else if (width == 4) {
    for (int e = 0; e < 4; e++) ((unsigned *)to)[e] = ((const unsigned *)from)[e];
  } else if (width == 2) {
    for (int e = 0; e < 8; e++) ((unsigned short *)to)[e] = ((const unsigned short *)from)[e];
  } else {
    for (int e = 0; e < 16; e++) ((unsigned char *)to)[e] = ((const unsigned char *)from)[e];
  }
}

/* Two e4m3 in the low half of `x` as two f16, exactly. */
DSA_DEVICE unsigned dsa_e4m3x2_to_f16x2(unsigned x) {
  unsigned both = (x & 0xFF) | (x & 0xFF00) << 8;
  unsigned sign = (both & 0x00800080) << 8, magnitude = both & 0x007F007F;
  /* The exponent's bias is 8 less than f16's: the shifted bits are the value times 2**-8, subnormals included. */
  unsigned scaled = dsa_mul_f16x2(magnitude << 7, 0x5C005C00);
  /* NaN is the one magnitude that carries into bit 7. */
  unsigned nan = (magnitude + 0x00010001 & 0x00800080) * 0xFC;
  return scaled | nan | sign;
}
