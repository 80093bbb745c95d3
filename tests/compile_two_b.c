/* The other one calls it: a matmul and an error, through the declarations only. */
#include "dsv3.h"

#include <string.h>

int main(void)
{
    const float weight[2][3] = {{1, 2, 3}, {4, 5, 6}}, in[3] = {1, 0, 2};
    float out[2] = {0, 0};
    unsigned char data[sizeof weight];
    dsv3_tensor tensor;
    dsv3_error error;
    dsv3_model *model = NULL;
    if (dsv3_quantize(&tensor, data, sizeof data, NULL, 0, DSV3_DTYPE_F32, &weight[0][0], 2, 3, &error) ||
        dsv3_matmul(out, in, 1, &tensor, NULL, &error))
        return 1;
    if (out[0] < 6.5f || out[0] > 7.5f || out[1] < 15.5f || out[1] > 16.5f)
        return 2;
    if (dsv3_model_open(&model, "no/such/directory", NULL, &error) == DSV3_OK || model || !error.message[0])
        return 3;
    return strncmp(dsv3_result_name(error.code), "DSV3_ERROR_", 11) == 0 ? 0 : 4;
}
