/* test_modes.c again, with the kernels for AVX-VNNI and AVX-512 over emulated intrinsics: for machines that lack these. */
#define TEST_EMULATE_AVX512
#include "test_modes.c"
