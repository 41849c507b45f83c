/* Device functions that need only C++ and primitives.cuh, which is included first. */
#pragma once

/* The bits of four elements of `row` from `at` on. Those outside [low, high) are NaN, and are not read. */
DSA_DEVICE void dsa_load_row4(unsigned *to, const float *row, int64_t at, int64_t low, int64_t high) {
  const float *from = row + at;
  if (at >= low && at + 4 <= high && ((uintptr_t)from & 15) == 0) {
    dsa_load_128(to, from);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) to[e] = at + e >= low && at + e < high ? ((const unsigned *)from)[e] : 0x7FFFFFFFu;
}

/* The number of f32 between `p` and the 16 byte boundary before it. */
DSA_DEVICE int dsa_behind_16(const float *p) { return (int)((uintptr_t)p >> 2 & 3); }

/* Copies 16 bytes to shared memory, asynchronously if `from` is aligned to 16, otherwise at once. `from` is aligned to
   `width`, the bytes of an element. Writes zeros if `valid` is 0, and then does not read `from`. */
DSA_DEVICE void dsa_copy_16(void *to, const void *from, int width, int valid) {
  if (((uintptr_t)from & 15) == 0 || !valid) {
    /* The address must be aligned even if nothing is read. */
    dsa_cp_async_16(to, (const void *)((uintptr_t)from & ~(uintptr_t)15), valid);
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
#ifdef DSA_HAS_E4M3
  return dsa_cvt_e4m3x2(x);
#else
  unsigned both = (x & 0xFF) | (x & 0xFF00) << 8;
  unsigned sign = (both & 0x00800080) << 8, magnitude = both & 0x007F007F;
  /* The exponent's bias is 8 less than that of f16. So the shifted bits are the value times 2**-8, even for subnormals.
     */
  unsigned scaled = dsa_mul_f16x2(magnitude << 7, 0x5C005C00);
  /* NaN is the only magnitude that carries into bit 7. */
  unsigned nan = (magnitude + 0x00010001 & 0x00800080) * 0xFC;
  return scaled | nan | sign;
#endif
}

/* Loads 16 aligned bytes of shared memory into registers. */
struct alignas(16) DsaFour {
  float x[4];
};
DSA_DEVICE void dsa_get_128(float *to, const void *from) {
  DsaFour four = *(const DsaFour *)from;
#pragma unroll
  for (int e = 0; e < 4; e++) to[e] = four.x[e];
}

/* Stores 4 bytes to an address that may be aligned to 2 only. */
DSA_DEVICE void dsa_put_2x16(void *to, unsigned x) {
  if (((uintptr_t)to & 3) == 0) {
    *(unsigned *)to = x;
  } else {
    ((unsigned short *)to)[0] = (unsigned short)x;
    ((unsigned short *)to)[1] = (unsigned short)(x >> 16);
  }
}

/* Stores 4 aligned bytes. */
DSA_DEVICE void dsa_put_32(void *to, unsigned x) { *(unsigned *)to = x; }

/* Two e4m3 in the low half of `x` as two bf16, exactly. As for f16, but here the biases differ by 120. */
DSA_DEVICE unsigned dsa_e4m3x2_to_bf16x2(unsigned x) {
  unsigned both = (x & 0xFF) | (x & 0xFF00) << 8;
  unsigned sign = (both & 0x00800080) << 8, magnitude = both & 0x007F007F;
  unsigned scaled = dsa_mul_bf16x2(magnitude << 4, 0x7B807B80);
  unsigned nan = (magnitude + 0x00010001 & 0x00800080) * 0xFF;
  return scaled | nan | sign;
}

/* Loads 16 bytes of global memory. `from` is aligned to `width`, the bytes of an element. */
DSA_DEVICE void dsa_load_16(unsigned *to, const void *from, int width) {
  if (((uintptr_t)from & 15) == 0) {
    dsa_load_128(to, from);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const unsigned char *bytes = (const unsigned char *)from + 4 * e;
    if (width == 4)
      to[e] = *(const unsigned *)bytes;
    else if (width == 2)
      to[e] = ((const unsigned short *)bytes)[0] | (unsigned)((const unsigned short *)bytes)[1] << 16;
    else
      to[e] = bytes[0] | bytes[1] << 8 | bytes[2] << 16 | (unsigned)bytes[3] << 24;
  }
}

/* 16 elements for tensor cores, two in each word. e4m3 becomes f16. f32 becomes a sum of three bf16, eight words each.
   */
DSA_DEVICE void dsa_words_bfloat16(unsigned *words, const void *from) {
  dsa_load_16(words, from, 2);
  dsa_load_16(words + 4, (const char *)from + 16, 2);
}
DSA_DEVICE void dsa_words_float16(unsigned *words, const void *from) { dsa_words_bfloat16(words, from); }
DSA_DEVICE void dsa_words_float8_e4m3fn(unsigned *words, const void *from) {
  unsigned raw[4];
  dsa_load_16(raw, from, 1);
#pragma unroll
  for (int i = 0; i < 8; i++) words[i] = dsa_e4m3x2_to_f16x2(raw[i / 2] >> 16 * (i % 2));
}
DSA_DEVICE void dsa_words_float32(unsigned *words, const void *from) {
#pragma unroll
  for (int i = 0; i < 24; i++) words[i] = 0;
#pragma unroll
  for (int quad = 0; quad < 4; quad++) {
    unsigned raw[4];
    dsa_load_16(raw, (const char *)from + 16 * quad, 4);
#pragma unroll
    for (int e = 0; e < 4; e++) {
      unsigned bits = raw[e], magnitude = bits & 0x7FFFFFFF;
      /* An infinity or NaN has no remainder. */
      if (magnitude > 0x7F800000) bits = 0x7FFF0000;
#pragma unroll
      for (int part = 0; part < 3; part++) {
        unsigned top = bits & 0xFFFF0000;
        words[part * 8 + quad * 2 + e / 2] |= e % 2 ? top : top >> 16;
        float x, cut;
        memcpy(&x, &bits, 4);
        memcpy(&cut, &top, 4);
        x -= cut;
        memcpy(&bits, &x, 4);
        if (magnitude >= 0x7F800000) bits = 0;
      }
    }
  }
}

/* Stores words 0, 2, 4, 6 to 16 aligned bytes of shared memory, and words 1, 3, 5, 7 to others. */
struct alignas(16) DsaFourWords {
  unsigned x[4];
};
DSA_DEVICE void dsa_put_even_odd(void *even, void *odd, const unsigned *words) {
  *(DsaFourWords *)even = {words[0], words[2], words[4], words[6]};
  *(DsaFourWords *)odd = {words[1], words[3], words[5], words[7]};
}

/* Move four words between registers and 16 aligned bytes of shared memory. */
DSA_DEVICE void dsa_get_4x32(unsigned *to, const void *from) {
  DsaFourWords four = *(const DsaFourWords *)from;
#pragma unroll
  for (int e = 0; e < 4; e++) to[e] = four.x[e];
}
DSA_DEVICE void dsa_put_4x32(void *to, const unsigned *x) { *(DsaFourWords *)to = {x[0], x[1], x[2], x[3]}; }

DSA_DEVICE int dsa_aligned_16(const void *p) { return ((uintptr_t)p & 15) == 0; }

DSA_DEVICE int dsa_clamp(int x, int low, int high) { return min(max(x, low), high); }

/* Copies 16 bytes to shared memory at once. Writes zeros and reads nothing if `valid` is 0. */
DSA_DEVICE void dsa_copy_elements(void *to, const void *from, int width, int valid) {
  DsaFourWords words = {0, 0, 0, 0};
  if (valid) dsa_load_16(words.x, from, width);
  *(DsaFourWords *)to = words;
}

/* The same, asynchronously if `from` is aligned to 16. */
DSA_DEVICE void dsa_copy_or_clear_16(void *to, const void *from, int width, int valid) {
  if (((uintptr_t)from & 15) == 0)
    dsa_cp_async_16(to, from, valid);
  else
    dsa_copy_elements(to, from, width, valid);
}

/* Loads two neighbouring 16 bit elements, the first one into the low half. */
DSA_DEVICE unsigned dsa_get_2x16(const void *from) {
  if (((uintptr_t)from & 3) == 0) return *(const unsigned *)from;
  const unsigned short *elements = (const unsigned short *)from;
  return elements[0] | (unsigned)elements[1] << 16;
}

/* Load and store 8 aligned bytes. */
struct alignas(8) DsaTwo {
  float x[2];
};
DSA_DEVICE void dsa_get_64(float *to, const void *from) {
  DsaTwo two = *(const DsaTwo *)from;
  to[0] = two.x[0];
  to[1] = two.x[1];
}
DSA_DEVICE void dsa_put_64(void *to, float low, float high) { *(DsaTwo *)to = {low, high}; }

/* The differences between two f32 and their values in 16 bits, `rounded`. The differences are rounded likewise. */
DSA_DEVICE unsigned dsa_rest_bf16(float low, float high, unsigned rounded) {
  unsigned bits[2] = {rounded << 16, rounded & 0xFFFF0000};
  float x[2];
  memcpy(x, bits, 8);
  return dsa_pack_bf16(low - x[0], high - x[1]);
}
DSA_DEVICE unsigned dsa_rest_f16(float low, float high, unsigned rounded) {
  float x = dsa_f16_to_f32((unsigned short)rounded), y = dsa_f16_to_f32((unsigned short)(rounded >> 16));
  return dsa_pack_f16(low - x, high - y);
}

/* Transposes the words of four neighbouring threads: thread i gets word i of each, in order. All of a warp call it. */
DSA_DEVICE void dsa_transpose_quad(unsigned *x) {
  int odd = threadIdx.x & 1, upper = threadIdx.x >> 1 & 1;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    unsigned got = dsa_shuffle_xor(odd ? x[i] : x[i + 1], 1);
    x[i] = odd ? got : x[i];
    x[i + 1] = odd ? x[i + 1] : got;
  }
  unsigned low = dsa_shuffle_xor(upper ? x[0] : x[2], 2), high = dsa_shuffle_xor(upper ? x[1] : x[3], 2);
  /* Select values, not addresses: registers have none. */
  x[0] = upper ? low : x[0], x[1] = upper ? high : x[1];
  x[2] = upper ? x[2] : low, x[3] = upper ? x[3] : high;
}

/* Stores 16 bytes to an address that may be aligned to 2 only. */
DSA_DEVICE void dsa_put_8x16(void *to, const unsigned *x) {
  if (((uintptr_t)to & 15) == 0) {
    dsa_put_4x32(to, x);
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; e++) ((unsigned short *)to)[e] = (unsigned short)(x[e / 2] >> e % 2 * 16);
}

/* Multiplies 16 e4m3 by `scale` and stores bf16, eight to 16 aligned bytes each; the second eight first if `swapped`.
   */
DSA_DEVICE void dsa_put_e4m3_as_bf16(void *first, void *second, const unsigned *raw, float scale, int swapped) {
  unsigned words[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    unsigned pair = dsa_e4m3x2_to_f16x2((swapped ? raw[(i / 2 + 2) % 4] : raw[i / 2]) >> 16 * (i % 2));
    float x = dsa_f16_to_f32((unsigned short)pair), y = dsa_f16_to_f32((unsigned short)(pair >> 16));
    words[i] = dsa_pack_bf16(x * scale, y * scale);
  }
  *(DsaFourWords *)first = {words[0], words[1], words[2], words[3]};
  *(DsaFourWords *)second = {words[4], words[5], words[6], words[7]};
}

/* The same, for e4m3 in 16 aligned bytes of shared memory. */
DSA_DEVICE void dsa_widen_e4m3_16(void *first, void *second, const void *from, float scale, int swapped) {
  DsaFourWords raw = *(const DsaFourWords *)from;
  dsa_put_e4m3_as_bf16(first, second, raw.x, scale, swapped);
}

/* Copy 16 aligned bytes; and 4 bytes from any address to shared memory, or zeros if `valid` is 0. */
DSA_DEVICE void dsa_move_16(void *to, const void *from) { *(DsaFourWords *)to = *(const DsaFourWords *)from; }
DSA_DEVICE void dsa_copy_4_bytes(void *to, const void *from, int valid) {
  for (int e = 0; e < 4; e++) ((unsigned char *)to)[e] = valid ? ((const unsigned char *)from)[e] : 0;
}

/* Loads an f32, at 4 aligned bytes, that nobody writes while the kernel runs. */
DSA_DEVICE float dsa_load_f32(const void *from) { return *(const float *)from; }

/* Stores 4 aligned bytes at `at` bytes after `start`. */
DSA_DEVICE void dsa_put_32_behind(void *start, int at, unsigned x) { *(unsigned *)((char *)start + at) = x; }
