/* The error of the last call that failed, for each thread. */
#include <stdarg.h>
#include <stdio.h>

#include "common/internal.h"

static _Thread_local char last_error[1024];

dsa_tvm_status dsa_fail(dsa_tvm_status status, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return status;
}

const char *dsa_tvm_last_error(void) { return last_error; }
