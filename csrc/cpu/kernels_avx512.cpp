#if defined(__x86_64__)
#define SIGNADAM_ISA avx512
#define SIGNADAM_ISA_NAME "avx512"
#define SIGNADAM_ISA_TABLE avx512_kernels
#include "kernels.inl"
#endif
