#define SIGNADAM_ISA portable
#define SIGNADAM_ISA_NAME "portable"
#define SIGNADAM_ISA_TABLE portable_kernels
#include "kernels.inl"
