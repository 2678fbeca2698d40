#if defined(__x86_64__)
#define SIGNADAM_ISA avx2
#define SIGNADAM_ISA_NAME "avx2"
#define SIGNADAM_ISA_TABLE avx2_kernels
#include "kernels.inl"
#endif
