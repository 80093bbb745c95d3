/* The declarations alone, in C99: every struct of options is right when zero, and nothing else is needed. */
#include "dsv3.h"

int compile_c99(void);

int compile_c99(void)
{
    dsv3_model_opts model_opts = {0};
    dsv3_session_opts session_opts = {0};
    dsv3_generate_opts generate_opts = {0};
    dsv3_matmul_opts matmul_opts = {0};
    dsv3_outputs outputs = {0};
    dsv3_error error = {DSV3_OK, 0, 0, ""};
    return (int)(model_opts.struct_size + session_opts.struct_size + generate_opts.struct_size + matmul_opts.struct_size +
                 outputs.struct_size) + (int)error.code + DSV3_VERSION_MAJOR;
}
