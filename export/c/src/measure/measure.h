/* What the files of a library made for measuring share. */
#ifndef DSA_TVM_MEASURE_H_
#define DSA_TVM_MEASURE_H_

enum { MOST_MEASURED_THREADS = 1024 };

/* peak.c: the best GFLOP/s that `threads` threads reached within some seconds of multiply-adds in registers. */
double dsa_peak(int threads, double seconds);

#endif
