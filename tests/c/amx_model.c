/* A plain model of the instructions of AMX that kernels use, after the pseudo-code of Intel's Software Developer's Manual.
 * It ends the program where a CPU would raise an exception. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64 };
struct tile {
  int rows, row_bytes;
  uint8_t bytes[ROWS][ROW_BYTES];
};
static _Thread_local int configured;
static _Thread_local struct tile tiles[TILES];

static void expect(int holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "tiles: %s\n", what);
  abort();
}

static struct tile *tile(uint8_t number) {
  expect(configured, "used before they are configured");
  expect(number < TILES && tiles[number].rows > 0, "one that is not configured");
  return &tiles[number];
}

void model_ldtilecfg(const void *configuration) {
  uint8_t bytes[64];
  memcpy(bytes, configuration, sizeof bytes);
  expect(!configured, "configured again before they are released");
  expect(bytes[0] == 1 && bytes[1] == 0, "another palette");
  memset(tiles, 0, sizeof tiles);
  for (int i = 0; i < TILES; i++) {
    tiles[i].row_bytes = bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8;
    tiles[i].rows = bytes[48 + i];
    expect(tiles[i].rows <= ROWS && tiles[i].row_bytes <= ROW_BYTES, "too large");
  }
  configured = 1;
}

void model_tilerelease(void) { configured = 0; }

void model_tilezero(uint8_t number) {
  struct tile *t = tile(number);
  memset(t->bytes, 0, sizeof t->bytes);
}

void model_tileloadd64(uint8_t number, const char *from, int64_t stride) {
  struct tile *t = tile(number);
  memset(t->bytes, 0, sizeof t->bytes);
  for (int i = 0; i < t->rows; i++) memcpy(t->bytes[i], from + i * stride, (size_t)t->row_bytes);
}

void model_tilestored64(uint8_t number, char *to, int64_t stride) {
  const struct tile *t = tile(number);
  for (int i = 0; i < t->rows; i++) memcpy(to + i * stride, t->bytes[i], (size_t)t->row_bytes);
}

/* Subnormal numbers are zeros, as operands and as results. */
static float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

static float bf16(const uint8_t *at) {
  const uint32_t bits = (uint32_t)at[0] << 16 | (uint32_t)at[1] << 24;
  float x;
  memcpy(&x, &bits, sizeof x);
  return flushed(x);
}

static void check(const struct tile *c, const struct tile *a, const struct tile *b) {
  expect(c != a && c != b && a != b, "the same one twice");
  expect(c->rows == a->rows && c->row_bytes == b->row_bytes && a->row_bytes == 4 * b->rows, "of other shapes");
}

void model_tdpbf16ps(uint8_t sums, uint8_t left, uint8_t right) {
  struct tile *c = tile(sums), *a = tile(left), *b = tile(right);
  check(c, a, b);
  for (int m = 0; m < c->rows; m++)
    for (int n = 0; n < c->row_bytes / 4; n++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < a->row_bytes / 4; k++) {
        even = flushed(fmaf(bf16(&a->bytes[m][4 * k]), bf16(&b->bytes[k][4 * n]), even));
        odd = flushed(fmaf(bf16(&a->bytes[m][4 * k + 2]), bf16(&b->bytes[k][4 * n + 2]), odd));
      }
      memcpy(&sum, &c->bytes[m][4 * n], sizeof sum);
      sum = flushed(flushed(sum) + flushed(even + odd));
      memcpy(&c->bytes[m][4 * n], &sum, sizeof sum);
    }
}

void model_tdpbssd(uint8_t sums, uint8_t left, uint8_t right) {
  struct tile *c = tile(sums), *a = tile(left), *b = tile(right);
  check(c, a, b);
  for (int m = 0; m < c->rows; m++)
    for (int n = 0; n < c->row_bytes / 4; n++) {
      int32_t sum;
      memcpy(&sum, &c->bytes[m][4 * n], sizeof sum);
      for (int i = 0; i < a->row_bytes; i++) sum += (int8_t)a->bytes[m][i] * (int8_t)b->bytes[i / 4][4 * n + i % 4];
      memcpy(&c->bytes[m][4 * n], &sum, sizeof sum);
    }
}
