/* Tensor maps as the driver's entry point encodes them, here in a layout of our own. */
#pragma once

#include <stdint.h>
#include <string.h>

struct alignas(64) CUtensorMap {
  uint64_t written; /* MAP_WRITTEN */
  const char *base;
  uint64_t lengths[3], strides[3]; /* innermost first; elements, bytes */
  uint32_t box[3], rank, element_bytes, span; /* span: bytes to a row of the swizzle, 0 for none */
};
static_assert(sizeof(CUtensorMap) == 128, "as large as the driver's");

constexpr uint64_t MAP_WRITTEN = 0x70616D726F736E65;

/* cuTensorMapEncodeTiled, refusing what the driver refuses, and what is not modelled. */
inline int encode_tensor_map(CUtensorMap *map, int type, uint32_t rank, const void *base, const uint64_t *lengths,
                             const uint64_t *strides, const uint32_t *box, const uint32_t *element_strides,
                             int interleave, int swizzle, int oob_fill) {
  static const uint32_t BYTES[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2}, SPANS[] = {0, 32, 64, 128};
  constexpr int INVALID = 1;
  if (type < 0 || type > 9 || rank < 2 || rank > 3 || swizzle < 0 || swizzle > 3 || interleave || oob_fill)
    return INVALID;
  if ((uintptr_t)map % 64 || (uintptr_t)base % 16) return INVALID;
  CUtensorMap m = {};
  m.written = MAP_WRITTEN;
  m.base = (const char *)base;
  m.rank = rank;
  m.element_bytes = BYTES[type];
  m.span = SPANS[swizzle];
  m.strides[0] = m.element_bytes;
  for (uint32_t i = 0; i < 3; i++) {
    m.lengths[i] = i < rank ? lengths[i] : 1;
    m.box[i] = i < rank ? box[i] : 1;
    if (m.lengths[i] == 0 || m.lengths[i] > 1ull << 32 || m.box[i] == 0 || m.box[i] > 256) return INVALID;
    if (i < rank && element_strides[i] != 1) return INVALID;
    if (i && i < rank) {
      m.strides[i] = strides[i - 1];
      if (m.strides[i] % 16 || m.strides[i] >= 1ull << 40) return INVALID;
    }
  }
  uint32_t row = m.box[0] * m.element_bytes;
  if (row % 16 || (m.span && row != m.span)) return INVALID;
  *map = m;
  return 0;
}
