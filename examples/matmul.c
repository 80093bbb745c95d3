/* Only the quantized tensor: a matrix is quantized to FP8 as DeepSeek-V3 stores it (128 x 128 blocks), multiplied with a
   few rows, and compared with the product in double. With a checkpoint and a tensor's name it multiplies a weight of the
   mapped file instead, which is all that a host wants who has a network of his own.

     cc -O2 -I. examples/matmul.c -o matmul -lm -pthread
     ./matmul
     ./matmul examples/tiny model.layers.0.mlp.down_proj.weight */

#define DSV3_IMPLEMENTATION
#include "dsv3.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 300, COLUMNS = 500, N = 3 }; /* neither a multiple of 128 */

static int failed(const dsv3_error *error)
{
    fprintf(stderr, "matmul: %s\n", error->message);
    return 1;
}

static float noise(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

/* out [N, rows] = in [N, columns] times the weight, and the largest difference from the same sum in double. */
static int multiply(const dsv3_tensor *weight)
{
    size_t rows = (size_t)weight->shape[0], columns = (size_t)weight->shape[1];
    float *in = (float *)malloc(N * columns * sizeof(float)), *out = (float *)malloc(N * rows * sizeof(float));
    float *row = (float *)malloc(columns * sizeof(float));
    double worst = 0;
    uint32_t state = 1;
    dsv3_error error = {DSV3_ERROR_OUT_OF_MEMORY, 0, 0, "out of memory"};
    dsv3_result result = in && out && row ? DSV3_OK : error.code;
    dsv3_matmul_opts opts = {0};
    for (size_t i = 0; !result && i < N * columns; i++)
        in[i] = noise(&state);
    if (!result)
        result = dsv3_matmul(out, in, N, weight, &opts, &error);
    for (size_t r = 0; !result && r < rows; r++) {
        result = dsv3_dequantize(row, weight, r, 1, &error);
        for (size_t i = 0; !result && i < N; i++) {
            double sum = 0;
            for (size_t c = 0; c < columns; c++)
                sum += (double)row[c] * (double)in[i * columns + c];
            worst = fmax(worst, fabs(sum - (double)out[i * rows + r]));
        }
    }
    if (!result)
        printf("%s [%zu, %zu] times %d rows: largest difference from the sum in double %.2g\n",
               dsv3_dtype_name(weight->dtype), rows, columns, (int)N, worst);
    free(in), free(out), free(row);
    return result ? failed(&error) : 0;
}

int main(int argc, char **argv)
{
    dsv3_tensor weight;
    dsv3_error error;
    if (argc == 3) {
        dsv3_model *model;
        if (dsv3_model_open(&model, argv[1], NULL, &error))
            return failed(&error);
        int status = 1;
        if (dsv3_model_tensor(model, argv[2], &weight, &error))
            failed(&error);
        else if (weight.rank != 2)
            fprintf(stderr, "matmul: %s has %u dimensions, a matrix has 2\n", argv[2], (unsigned)weight.rank);
        else
            status = multiply(&weight);
        dsv3_model_close(model);
        return status;
    }
    if (argc != 1) {
        fprintf(stderr, "usage: matmul [DIR TENSOR]\n");
        return 2;
    }
    static float values[ROWS * COLUMNS];
    static uint8_t codes[ROWS * COLUMNS];
    float scales[3 * 4]; /* ceil(300 / 128) x ceil(500 / 128) */
    uint32_t state = 7;
    for (size_t i = 0; i < ROWS * COLUMNS; i++)
        values[i] = noise(&state) * 0.05f;
    if (dsv3_quantize(&weight, codes, sizeof codes, scales, 12, DSV3_DTYPE_F8_E4M3, values, ROWS, COLUMNS, &error))
        return failed(&error);
    return multiply(&weight);
}
