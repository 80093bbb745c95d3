/* test_kernels.c again, with the AVX-512 kernels over emulated intrinsics: for machines that lack AVX-512. */
#define TEST_EMULATE_AVX512
#include "test_kernels.c"
