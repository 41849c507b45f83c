/* Declarations that the files of a library for measuring share. */
#ifndef DSA_TVM_MEASURE_H_
#define DSA_TVM_MEASURE_H_

enum { MOST_MEASURED_THREADS = 1024 };

/* peak.c: the best GFLOP/s that `threads` threads reach with multiply-adds in registers, tried for `seconds`. */
double dsa_peak(int threads, double seconds);

#endif
