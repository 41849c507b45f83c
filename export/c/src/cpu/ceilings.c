/* Measures what a machine can do at most: multiply-adds in registers, and reading memory. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/internal.h"

typedef float f32x4 __attribute__((vector_size(16)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef int32_t i32x16 __attribute__((vector_size(64)));

#define UNROLLED _Pragma("GCC unroll 32")

/* A loop of `chains` independent sums: enough to hide the latency of a multiply-add, and few enough to stay in
 * registers. `add` is one step of a sum. */
#define MULTIPLY_ADDS(name, vector, chains, add)                      \
  static uint64_t name(int64_t steps) {                               \
    vector sum[chains];                                               \
    /* Different ones, or the compiler would compute one for all. */  \
    UNROLLED for (int i = 0; i < (chains); i++) sum[i] = (vector){i}; \
    for (int64_t step = 0; step < steps; step++) {                    \
      UNROLLED for (int i = 0; i < (chains); i++) sum[i] = add;       \
    }                                                                 \
    UNROLLED for (int i = 1; i < (chains); i++) sum[0] += sum[i];     \
    uint64_t seen;                                                    \
    memcpy(&seen, &sum[0], sizeof seen);                              \
    return seen;                                                      \
  }
#define F32(vector) (sum[i] * 0.999f + ((vector){0} + 0.001f))

enum { READ_AT_ONCE = 8, READ_BYTES = READ_AT_ONCE * 64 };
#define READS(name, vector)                                                        \
  static uint64_t name(const char *data, int64_t bytes) {                          \
    vector sum[READ_AT_ONCE];                                                      \
    UNROLLED for (int i = 0; i < READ_AT_ONCE; i++) sum[i] = (vector){0};          \
    const vector *at = (const vector *)data, *end = (const vector *)(data + bytes); \
    for (; at < end; at += READ_AT_ONCE) {                                         \
      UNROLLED for (int i = 0; i < READ_AT_ONCE; i++) sum[i] += at[i];             \
    }                                                                              \
    UNROLLED for (int i = 1; i < READ_AT_ONCE; i++) sum[0] += sum[i];              \
    uint64_t seen;                                                                 \
    memcpy(&seen, &sum[0], sizeof seen);                                           \
    return seen;                                                                   \
  }

/* This file is compiled for any CPU, but each function here for one target. */
#if defined(__x86_64__)
#define FOR(instructions) __attribute__((target(instructions)))
FOR("avx2,fma") MULTIPLY_ADDS(f32_avx2, f32x8, 12, F32(f32x8))
FOR("avx2,fma") READS(read_avx2, i32x8)
FOR("avx512f") MULTIPLY_ADDS(f32_avx512, f32x16, 24, F32(f32x16))
FOR("avx512f") READS(read_avx512, i32x16)
#define BF16(bits) ((__m512bh)_mm512_set1_epi16(bits))
#define DOT_BF16 (f32x16) _mm512_dpbf16_ps((__m512)sum[i], BF16(0x3f7f), BF16(0x3a83)) /* 0.996 and 0.001 */
FOR("avx512f,avx512bf16") MULTIPLY_ADDS(bf16_avx512, f32x16, 24, DOT_BF16)
#define DOT_INT8 (i32x16) _mm512_dpbusd_epi32((__m512i)sum[i], _mm512_set1_epi8(3), _mm512_set1_epi8(5))
FOR("avx512f,avx512vnni") MULTIPLY_ADDS(int8_avx512, i32x16, 24, DOT_INT8)
#if defined(__clang__) || __GNUC__ >= 11
#define DOT_INT8_256 (i32x8) _mm256_dpbusd_avx_epi32((__m256i)sum[i], _mm256_set1_epi8(3), _mm256_set1_epi8(5))
FOR("avx2,avxvnni") MULTIPLY_ADDS(int8_avx, i32x8, 12, DOT_INT8_256)
#else
#define int8_avx NULL
#endif
#if defined(__clang__) || __GNUC__ >= 11
/* Products of six tiles of sums, which hide the latency of one, by the same two tiles. Only where dsa_cpu_runs has said
 * that the process may use tiles. */
static const struct {
  uint8_t palette, start, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
} all_tiles = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
#define TILE_PRODUCTS(name, instruction)                    \
  static uint64_t name(int64_t steps) {                     \
    _tile_loadconfig(&all_tiles);                           \
    _tile_zero(0);                                          \
    _tile_zero(1);                                          \
    _tile_zero(2);                                          \
    _tile_zero(3);                                          \
    _tile_zero(4);                                          \
    _tile_zero(5);                                          \
    _tile_zero(6);                                          \
    _tile_zero(7);                                          \
    for (int64_t step = 0; step < steps; step++) {          \
      instruction(0, 6, 7);                                 \
      instruction(1, 6, 7);                                 \
      instruction(2, 6, 7);                                 \
      instruction(3, 6, 7);                                 \
      instruction(4, 6, 7);                                 \
      instruction(5, 6, 7);                                 \
    }                                                       \
    _tile_release();                                        \
    return 0;                                               \
  }
FOR("amx-tile,amx-bf16") TILE_PRODUCTS(bf16_amx, _tile_dpbf16ps)
FOR("amx-tile,amx-int8") TILE_PRODUCTS(int8_amx, _tile_dpbssd)
#else
#define bf16_amx NULL
#define int8_amx NULL
#endif
MULTIPLY_ADDS(f32_any, f32x4, 12, F32(f32x4))
#else
MULTIPLY_ADDS(f32_any, f32x4, 24, F32(f32x4))
#endif
READS(read_any, i32x4)

struct limits {
  const char *target;
  /* By element type: the loop, and the floating-point operations of a step of it. NULL: the target has none. */
  struct {
    uint64_t (*loop)(int64_t steps);
    int step;
  } products[DSA_NUM_PRODUCTS];
  uint64_t (*read)(const char *data, int64_t bytes);
};

static const struct limits limits[] = {
#if defined(__x86_64__)
    {"x86-64-v4-amx", {{f32_avx512, 24 * 32}, {bf16_amx, 6 * 16384}, {int8_amx, 6 * 32768}}, read_avx512},
    {"x86-64-v4-bf16", {{f32_avx512, 24 * 32}, {bf16_avx512, 24 * 64}, {int8_avx512, 24 * 128}}, read_avx512},
    {"x86-64-v4-vnni", {{f32_avx512, 24 * 32}, {NULL, 0}, {int8_avx512, 24 * 128}}, read_avx512},
    {"x86-64-v4", {{f32_avx512, 24 * 32}}, read_avx512},
    {"x86-64-v3-vnni", {{f32_avx2, 12 * 16}, {NULL, 0}, {int8_avx, 12 * 64}}, read_avx2},
    {"x86-64-v3", {{f32_avx2, 12 * 16}}, read_avx2},
    {"", {{f32_any, 12 * 8}}, read_any},
#else
    {"", {{f32_any, 24 * 8}}, read_any},
#endif
};

/* The last serves every other target. */
static const struct limits *limits_of(const char *target) {
  const struct limits *found = limits;
  while (*found->target && strcmp(found->target, target)) found++;
  return found;
}

static double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

struct work {
  const struct limits *limits;
  int product;
  int64_t steps;    /* of the loop; or how often everything is read */
  char *data;       /* of all threads */
  int64_t bytes;    /* of one thread */
};

static void multiply(void *arg, int64_t index) {
  const struct work *w = arg;
  volatile uint64_t seen = w->limits->products[w->product].loop(w->steps); /* volatile: computed although unused */
  (void)seen, (void)index;
}

static void read_all(void *arg, int64_t index) {
  const struct work *w = arg;
  for (int64_t i = 0; i < w->steps; i++) {
    volatile uint64_t seen = w->limits->read(w->data + index * w->bytes, w->bytes);
    (void)seen;
  }
}

static void fill(void *arg, int64_t index) {
  const struct work *w = arg;
  memset(w->data + index * w->bytes, 1, (size_t)w->bytes);
}

/* The most that `task` does in a second, tried for `seconds`; it does `amount` a step on each thread. */
static double best_rate(struct work *w, int threads, dsa_task task, double amount, double seconds) {
  const struct dsa_executor executor = dsa_pool_executor(threads);
  double start = seconds_now(), best = 0;
  w->steps = 1;
  do {
    double begin = seconds_now();
    dsa_parallel_for(&executor, threads, threads, task, w);
    double taken = seconds_now() - begin, rate = amount * (double)w->steps * threads / taken;
    if (rate > best) best = rate;
    /* A round takes a twentieth of the time: long enough to start the threads, and some round is undisturbed. */
    if (taken < seconds / 40) w->steps *= 2;
  } while (seconds_now() - start < seconds);
  return best;
}

double dsa_peak(const char *target, int product, int threads, double seconds) {
  struct work w = {.limits = limits_of(target), .product = product};
  if (!w.limits->products[product].loop) return 0;
  return best_rate(&w, threads, multiply, w.limits->products[product].step, seconds);
}

double dsa_read_rate(const char *target, int64_t bytes, int threads, double seconds) {
  int64_t each = divide_up(divide_up(bytes, threads), READ_BYTES) * READ_BYTES;
  struct work w = {.limits = limits_of(target), .bytes = each, .data = aligned_alloc(64, (size_t)(each * threads))};
  if (!w.data) return 0;
  const struct dsa_executor executor = dsa_pool_executor(threads);
  /* Each thread gets the memory that it will read. */
  dsa_parallel_for(&executor, threads, threads, fill, &w);
  double rate = best_rate(&w, threads, read_all, (double)each, seconds);
  free(w.data);
  return rate;
}
