// The declarations alone, in C++: no cast, no extern "C" of the host's own.
#include "dsv3.h"

int compile_cpp();

int compile_cpp()
{
    dsv3_model_opts model_opts = {};
    dsv3_session_opts session_opts = {};
    dsv3_generate_opts generate_opts = {};
    generate_opts.token_fn = [](void *, const dsv3_token *token) { return token->id >= 0; };
    dsv3_error error = {};
    return int(model_opts.isa) + int(session_opts.max_tokens) + int(generate_opts.max_tokens) + int(error.code) +
           (dsv3_version() == DSV3_VERSION ? 0 : 1);
}
