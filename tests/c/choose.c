/* The target that a library takes on CPUs of which CPUID and XGETBV say what the arguments are, and what it takes if
 * DSA_TVM_TARGET is set. Linux lets the process use tiles unless TILES is "refused", and the kernel that multiplies them
 * is right unless it is "wrong". */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common/x86_level.h"

static struct x86_features masked;
static int allowed;
static struct x86_features features_given(void) { return masked; }
static const char *tiles(void) { return getenv("TILES") ? getenv("TILES") : ""; }

/* Whoever asks Linux, or runs the kernel, without having to, ends the program. */
static void expect(int holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "%s\n", what);
  abort();
}

static long asked(long number, long what, long feature) {
  expect(number == SYS_arch_prctl && what == 0x1023 && feature == 18, "another system call");
  expect(masked.edx_7 >> 24 & 1 && (masked.xcr0 >> 17 & 3) == 3, "asked for tiles that the CPU lacks");
  allowed = strcmp(tiles(), "refused") != 0;
  return allowed ? 0 : -1;
}

#define x86_features_here features_given
#define syscall asked
#include "common/choose.c"
#include "cpu/runs.c"

static float number(const dsa_tvm_tensor *x, int64_t i) {
  if (x->dtype.bits == 8) return ((const int8_t *)x->data)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)x->data)[i] << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

int __tvm_ffi_scores(void *self, const struct tvm_any *args, int32_t count, struct tvm_any *result) {
  (void)self, (void)count, (void)result;
  expect(allowed, "tiles that Linux has not allowed");
  const dsa_tvm_tensor *q = args[0].value.p, *k = args[1].value.p, *weights = args[2].value.p, *out = args[6].value.p;
  const int64_t heads = q->shape[1], width = q->shape[2], keys = k->shape[0];
  for (int64_t m = args[7].value.i; m < args[8].value.i; m++)
    for (int64_t n = args[9].value.i; n < args[10].value.i; n++) {
      float logit = 0;
      for (int64_t h = 0; h < heads; h++) {
        float sum = 0;
        for (int64_t d = 0; d < width; d++) sum += number(q, (m * heads + h) * width + d) * number(k, n * width + d);
        logit += sum > 0 ? sum * ((const float *)weights->data)[m * heads + h] : 0;
      }
      ((float *)out->data)[m * keys + n] = logit;
    }
  /* In one type only. */
  if (!strcmp(tiles(), "wrong") && q->dtype.bits == 8) ((float *)out->data)[keys - 1] += 1;
  if (!strcmp(tiles(), "failing")) return -1;
  return 0;
}

int main(int argc, char **argv) {
  for (int i = 1; i + 6 < argc; i += 7) {
    uint32_t word[7];
    for (int j = 0; j < 7; j++) word[j] = (uint32_t)strtoul(argv[i + j], NULL, 0);
    masked = (struct x86_features){word[0], word[1], word[2], word[3], word[4], word[5], word[6]};
    chosen = NULL;
    refusal[0] = 0;
    allowed = 0;
    choose();
    printf("%s\n", chosen ? chosen->target : refusal);
  }
  return 0;
}
