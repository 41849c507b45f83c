/* The model of products of a warp's tensor cores, and of how precise their sums may be. */
#pragma once

#include <array>
#include <cmath>

#include "emulator.h"

using std::max;

template <typename T> inline T *own(const void *p) { return (T *)const_cast<void *>(p); }

/* Element `e` of a register as the multiplication sees it. */
struct Bf16 {
  static constexpr int PER_REGISTER = 2;
  static float get(unsigned r, int e) {
    unsigned bits = r >> 16 * e << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  }
};
struct F16 {
  static constexpr int PER_REGISTER = 2;
  static float get(unsigned r, int e) {
    uint16_t bits = (uint16_t)(r >> 16 * e);
    _Float16 x;
    memcpy(&x, &bits, 2);
    return (float)x;
  }
};
struct S8 {
  static constexpr int PER_REGISTER = 4;
  static int get(unsigned r, int e) { return (int8_t)(r >> 8 * e); }
};

struct E4m3 {
  static constexpr int PER_REGISTER = 4;
  static float value(uint8_t bits) {
    static const auto VALUES = [] {
      std::array<float, 256> values;
      for (int bits = 0; bits < 256; bits++) {
        int exponent = bits >> 3 & 15, mantissa = bits & 7;
        float x = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
        if ((bits & 127) == 127) x = NAN;
        values[bits] = bits & 128 ? -x : x;
      }
      return values;
    }();
    return VALUES[bits];
  }
  static float get(unsigned r, int e) { return value((uint8_t)(r >> 8 * e)); }
};

/* A sum and `count` products with the precision that the launch asks for: all addends are cut to so many binary places
   behind the leading one of the largest, and their sum behind its own. */
inline float narrow_sum(float sum, const float *products, int count) {
  auto cut = [](double x, double largest) {
    double unit = ldexp(1, ilogb(largest) - emulator::m.options.sum_bits);
    return std::trunc(x / unit) * unit;
  };
  double largest = std::fabs(sum), total = 0;
  for (int i = 0; i < count; i++) {
    total += products[i];
    largest = max(largest, (double)std::fabs(products[i]));
  }
  total += sum;
  if (!std::isfinite(total) || largest == 0) return total;
  total = cut(sum, largest);
  for (int i = 0; i < count; i++) total += cut(products[i], largest);
  return total == 0 ? 0 : (float)cut(total, total);
}

template <typename C> struct Fragments {
  C *c;
  const unsigned *a, *b;
};

template <typename Type, typename C> inline void mma(const char *operation, C *c, const unsigned *a, const unsigned *b) {
  Fragments<C> in = {c, a, b};
  emulator::meet(operation, &in, nullptr, [](const void **in, void **) {
    constexpr int E = Type::PER_REGISTER, HALF = 4 * E;
    C A[16][2 * HALF], B[2 * HALF][8], sum[16][8];
    for (int l = 0; l < 32; l++) {
      const Fragments<C> &f = *own<Fragments<C>>(in[l]);
      int g = l / 4, t = l % 4;
      for (int i = 0; i < 4; i++) {
        for (int e = 0; e < E; e++) A[g + i % 2 * 8][t * E + e + i / 2 * HALF] = Type::get(f.a[i], e);
        sum[g + i / 2 * 8][t * 2 + i % 2] = f.c[i];
      }
      for (int i = 0; i < 2; i++)
        for (int e = 0; e < E; e++) B[t * E + e + i * HALF][g] = Type::get(f.b[i], e);
    }
    if (!std::is_same_v<C, int> && emulator::m.options.sum_bits) {
      for (int r = 0; r < 16; r++)
        for (int n = 0; n < 8; n++) {
          float products[2 * HALF];
          for (int k = 0; k < 2 * HALF; k++) products[k] = A[r][k] * B[k][n];
          sum[r][n] = narrow_sum(sum[r][n], products, 2 * HALF);
        }
    } else {
      for (int k = 0; k < 2 * HALF; k++)
        for (int r = 0; r < 16; r++)
          for (int n = 0; n < 8; n++) sum[r][n] += A[r][k] * B[k][n];
    }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++) own<Fragments<C>>(in[l])->c[i] = sum[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  });
}
