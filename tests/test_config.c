/* The floor cfg: config.json (and its two companions) as read; what this library does not run is refused by name. */
#include "dsv3.h"

#include "test.h"
#include "tiny.h"

static tiny t;
static dsv3_model *model;
static dsv3_error e;

static void build(tiny_opts o)
{
    tiny_free(&t);
    model = NULL;
    tiny_build(&t, &o);
}

static void done(void)
{
    dsv3_model_close(model);
    model = NULL;
    CHECK_EQ_INT(t.n_opened, t.n_closed);
    tiny_free(&t);
}

/* Opens the micro model with one key of config.json changed (NULL: taken out). */
static dsv3_result open_with(tiny_opts o, const char *key, const char *value)
{
    build(o);
    tiny_set(&t, "config.json", key, value);
    return tiny_open(&t, &model, NULL, &e);
}

/* Must be refused, naming the key. */
static void refused(tiny_opts o, const char *key, const char *value, const char *named)
{
    dsv3_result r = open_with(o, key, value);
    bool ok = CHECK_RESULT(r, DSV3_ERROR_UNSUPPORTED_MODEL, e) && CHECK_CONTAINS(e.message, named) && CHECK_CONTAINS(e.message, "config.json");
    ok = CHECK(model == NULL) && ok;
    if (!ok)
        printf("    with \"%s\": %s\n", key, value ? value : "(taken out)");
    done();
}

/* Must be refused in some way: as text that is no such value, or as a model that cannot be. */
static void wrong(const char *key, const char *value)
{
    dsv3_result r = open_with(tiny_micro(), key, value);
    if (r != DSV3_ERROR_JSON && r != DSV3_ERROR_UNSUPPORTED_MODEL && r != DSV3_ERROR_BAD_TENSOR && r != DSV3_ERROR_MISSING_TENSOR) {
        CHECK_RESULT(r, DSV3_ERROR_UNSUPPORTED_MODEL, e);
        printf("    with \"%s\": %s\n", key, value ? value : "(taken out)");
    }
    CHECK(model == NULL);
    CHECK(r == DSV3_OK || e.message[0]);
    done();
}

TEST(reads_every_field)
{
    build(tiny_default());
    tiny_set(&t, "config.json", "rms_norm_eps", "1e-05");
    tiny_set(&t, "config.json", "rope_theta", "50000.0");
    tiny_set(&t, "config.json", "num_nextn_predict_layers", "1");
    tiny_set(&t, "config.json", "rope_scaling",
             "{\"type\": \"yarn\", \"factor\": 40, \"original_max_position_embeddings\": 64, \"beta_fast\": 16, \"beta_slow\": 2.0, "
             "\"mscale\": 0.5, \"mscale_all_dim\": 0.707, \"attention_factor\": 1.25}");
    tiny_set(&t, "config.json", "quantization_config",
             "{\"activation_scheme\": \"dynamic\", \"fmt\": \"e4m3\", \"quant_method\": \"fp8\", \"scale_fmt\": \"ue8m0\", \"weight_block_size\": [128, 128]}");
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    const dsv3_config *c = dsv3_model_config(model);
    CHECK_EQ_STR(c->model_type, "deepseek_v3");
    CHECK_EQ_UINT(c->vocab_size, 320);
    CHECK_EQ_UINT(c->hidden_size, 64);
    CHECK_EQ_UINT(c->intermediate_size, 96);
    CHECK_EQ_UINT(c->moe_intermediate_size, 32);
    CHECK_EQ_UINT(c->num_hidden_layers, 3);
    CHECK_EQ_UINT(c->first_k_dense_replace, 1);
    CHECK_EQ_UINT(c->num_attention_heads, 4);
    CHECK_EQ_UINT(c->q_lora_rank, 32);
    CHECK_EQ_UINT(c->kv_lora_rank, 32);
    CHECK_EQ_UINT(c->qk_nope_head_dim, 16);
    CHECK_EQ_UINT(c->qk_rope_head_dim, 16);
    CHECK_EQ_UINT(c->v_head_dim, 24);
    CHECK_EQ_UINT(c->n_routed_experts, 8);
    CHECK_EQ_UINT(c->n_shared_experts, 1);
    CHECK_EQ_UINT(c->num_experts_per_tok, 3);
    CHECK_EQ_UINT(c->n_group, 4);
    CHECK_EQ_UINT(c->topk_group, 2);
    CHECK_EQ_UINT(c->max_position_embeddings, 256);
    CHECK_EQ_UINT(c->num_nextn_predict_layers, 1);
    CHECK_EQ_INT(c->scoring_func, DSV3_SCORING_SIGMOID);
    CHECK_EQ_INT(c->topk_method, DSV3_TOPK_NOAUX_TC);
    CHECK(c->norm_topk_prob && !c->tie_word_embeddings && c->rope_interleave && c->rope_yarn);
    CHECK(c->routed_scaling_factor == 2.5f);
    CHECK(c->rms_norm_eps == 1e-5f);
    CHECK(c->rope_theta == 50000.0);
    CHECK(c->rope_factor == 40.0);
    CHECK(c->rope_beta_fast == 16.0 && c->rope_beta_slow == 2.0);
    CHECK(c->rope_mscale == 0.5 && c->rope_mscale_all_dim == 0.707);
    CHECK(c->rope_attention_factor == 1.25);
    CHECK_EQ_UINT(c->rope_original_max_position_embeddings, 64);
    CHECK_EQ_INT(c->bos_token_id, 0);
    CHECK_EQ_UINT(c->n_eos, 1);
    CHECK_EQ_INT(c->eos_token_id[0], 1);
    CHECK_EQ_STR(c->dtype, "bfloat16");
    CHECK_EQ_STR(c->quant_method, "fp8");
    CHECK_EQ_STR(c->scale_fmt, "ue8m0");
    done();
}

TEST(reads_the_v2_family)
{
    tiny_opts o = tiny_v2();
    o.yarn = false;
    build(o);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    const dsv3_config *c = dsv3_model_config(model);
    CHECK_EQ_STR(c->model_type, "deepseek_v2");
    CHECK_EQ_INT(c->scoring_func, DSV3_SCORING_SOFTMAX);
    CHECK_EQ_INT(c->topk_method, DSV3_TOPK_GREEDY);
    CHECK(!c->norm_topk_prob && !c->rope_yarn);
    CHECK(c->rope_factor == 1.0);
    CHECK_EQ_UINT(c->q_lora_rank, 0);
    CHECK_EQ_UINT(c->n_shared_experts, 2);
    CHECK_EQ_STR(c->quant_method, "");
    done();
    o.n_group = 4, o.topk_group = 2;
    build(o);
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    CHECK_EQ_INT(dsv3_model_config(model)->topk_method, DSV3_TOPK_GROUP_LIMITED_GREEDY);
    done();
}

/* Missing keys take the defaults of the reference; keys that are not used may hold anything. */
TEST(defaults)
{
    static const char *const optional[] = {"attention_bias", "hidden_act", "moe_layer_freq", "num_key_value_heads", "num_nextn_predict_layers",
                                           "torch_dtype", "architectures", "tie_word_embeddings", "bos_token_id", "rope_scaling", "rope_theta"};
    build(tiny_micro());
    for (size_t i = 0; i < sizeof optional / sizeof optional[0]; i++)
        tiny_set(&t, "config.json", optional[i], NULL);
    tiny_drop(&t, "generation_config.json");
    tiny_set(&t, "config.json", "eos_token_id", NULL);
    tiny_set(&t, "config.json", "attention_dropout", "0.0");
    tiny_set(&t, "config.json", "head_dim", "12345");
    tiny_set(&t, "config.json", "auto_map", "{\"a\": [NaN, -Infinity, {\"b\": null}]}");
    tiny_set(&t, "config.json", "ep_size", "null");
    tiny_set(&t, "config.json", "mlp_bias", "false");
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    const dsv3_config *c = dsv3_model_config(model);
    CHECK_EQ_INT(c->bos_token_id, -1);
    CHECK_EQ_UINT(c->n_eos, 0);
    CHECK(!c->rope_yarn && c->rope_interleave && !c->tie_word_embeddings);
    CHECK(c->rope_theta == 10000.0);
    CHECK_EQ_UINT(c->num_nextn_predict_layers, 0);
    CHECK_EQ_STR(c->dtype, "");
    done();
}

TEST(spellings)
{
    build(tiny_micro()); /* one rope_parameters object, both of type and rope_type, ints as floats, dtype */
    tiny_set(&t, "config.json", "rope_scaling", NULL);
    tiny_set(&t, "config.json", "rope_theta", NULL);
    tiny_set(&t, "config.json", "rope_parameters",
             "{\"rope_type\": \"yarn\", \"type\": \"yarn\", \"rope_theta\": 5e4, \"factor\": 4.0, \"original_max_position_embeddings\": 16.0}");
    tiny_set(&t, "config.json", "vocab_size", "32.0");
    tiny_set(&t, "config.json", "torch_dtype", NULL);
    tiny_set(&t, "config.json", "dtype", "\"float16\"");
    tiny_set(&t, "config.json", "routed_scaling_factor", "2");
    tiny_set(&t, "config.json", "rms_norm_eps", "0.00001");
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    const dsv3_config *c = dsv3_model_config(model);
    CHECK(c->rope_yarn && c->rope_theta == 50000.0 && c->rope_factor == 4.0);
    CHECK(c->rope_beta_fast == 32.0 && c->rope_beta_slow == 1.0); /* not given */
    CHECK(c->rope_mscale == 0 && c->rope_mscale_all_dim == 0 && c->rope_attention_factor == 0);
    CHECK_EQ_UINT(c->rope_original_max_position_embeddings, 16);
    CHECK_EQ_UINT(c->vocab_size, 32);
    CHECK_EQ_STR(c->dtype, "float16");
    CHECK(c->rms_norm_eps == 1e-5f);
    done();

    CHECK_OK(open_with(tiny_micro(), "rope_scaling", "null"), e);
    if (model)
        CHECK(!dsv3_model_config(model)->rope_yarn);
    done();
    CHECK_OK(open_with(tiny_micro(), "rope_scaling", "{\"rope_type\": \"default\"}"), e);
    if (model)
        CHECK(!dsv3_model_config(model)->rope_yarn);
    done();
    CHECK_OK(open_with(tiny_micro(), "rope_interleave", "false"), e);
    if (model)
        CHECK(!dsv3_model_config(model)->rope_interleave);
    done();
    CHECK_OK(open_with(tiny_micro(), "num_key_value_heads", "null"), e);
    done();
    build(tiny_micro()); /* escapes */
    CHECK(tiny_replace(&t, "config.json", "\"hidden_act\": \"silu\"", "\"hidden_\\u0061ct\": \"s\\u0069lu\""));
    CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
    done();
    static const char *const types[] = {"\"kimi_k2\"", "\"joyai_llm_flash\""};
    for (int i = 0; i < 2; i++) {
        CHECK_OK(open_with(tiny_micro(), "model_type", types[i]), e);
        done();
    }
    build(tiny_micro()); /* GLM-like: no scoring_func, noaux_tc says it */
    tiny_set(&t, "config.json", "scoring_func", NULL);
    CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
    if (model)
        CHECK_EQ_INT(dsv3_model_config(model)->scoring_func, DSV3_SCORING_SIGMOID);
    done();
}

/* An absent q_lora_rank: the tensors say which it is. A contradiction is refused. */
TEST(q_lora_rank)
{
    tiny_opts lite = tiny_micro();
    lite.q_lora = 0;
    CHECK_OK(open_with(lite, "q_lora_rank", NULL), e);
    if (model)
        CHECK_EQ_UINT(dsv3_model_config(model)->q_lora_rank, 0);
    done();
    CHECK_OK(open_with(lite, "q_lora_rank", "0"), e);
    done();
    CHECK(open_with(lite, "q_lora_rank", "8") != DSV3_OK);
    CHECK_CONTAINS(e.message, "q_");
    done();
    CHECK(open_with(tiny_micro(), "q_lora_rank", "null") != DSV3_OK);
    CHECK_CONTAINS(e.message, "q_");
    done();
    CHECK(open_with(tiny_micro(), "q_lora_rank", "9") != DSV3_OK);
    CHECK_CONTAINS(e.message, "q_");
    done();
}

/* End-of-text ids of three files, each once. */
TEST(eos_ids)
{
    tiny_opts o = tiny_default();
    build(o);
    tiny_set(&t, "generation_config.json", "eos_token_id", "[7, 9, 7]");
    tiny_set(&t, "config.json", "eos_token_id", "[9, 11]");
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    const dsv3_config *c = dsv3_model_config(model);
    static const int32_t expected[] = {7, 9, 11, 1}; /* 1: eos_token of tokenizer_config.json */
    CHECK_EQ_UINT(c->n_eos, 4);
    for (uint32_t i = 0; i < 4; i++) {
        bool found = false;
        for (uint32_t k = 0; k < c->n_eos && k < 8; k++)
            found |= c->eos_token_id[k] == expected[i];
        CHECK(found);
    }
    done();

    o = tiny_micro();
    build(o);
    tiny_set(&t, "generation_config.json", "eos_token_id", "null");
    tiny_set(&t, "config.json", "eos_token_id", "null");
    CHECK_OK(tiny_open(&t, &model, NULL, &e), e);
    if (model)
        CHECK_EQ_UINT(dsv3_model_config(model)->n_eos, 0);
    done();

    build(o); /* more than there is room for: an error, or the first eight; never more */
    tiny_set(&t, "config.json", "eos_token_id", "[1,2,3,4,5,6,7,8,9,10,11,12]");
    if (tiny_open(&t, &model, NULL, &e) == DSV3_OK)
        CHECK(dsv3_model_config(model)->n_eos <= 8);
    done();
    wrong("eos_token_id", "\"one\"");
    wrong("bos_token_id", "[0]");
}

TEST(generation_defaults)
{
    dsv3_sample_opts s;
    build(tiny_micro());
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    dsv3_model_sampling(model, &s);
    CHECK(s.temperature == 0.6f && s.top_p == 0.95f && s.top_k == 0);
    done();

    build(tiny_micro());
    tiny_set(&t, "generation_config.json", "top_k", "40");
    tiny_set(&t, "generation_config.json", "min_p", "0.05");
    tiny_set(&t, "generation_config.json", "repetition_penalty", "1.1");
    REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
    dsv3_model_sampling(model, &s);
    CHECK(s.top_k == 40 && s.min_p == 0.05f && s.repetition_penalty == 1.1f);
    done();

    static const char *const greedy[] = {"do_sample", "temperature"};
    for (int i = 0; i < 2; i++) { /* do_sample false; no generation_config.json */
        build(tiny_micro());
        if (i == 0)
            tiny_set(&t, "generation_config.json", greedy[i], "false");
        else
            tiny_drop(&t, "generation_config.json");
        REQUIRE(CHECK_OK(tiny_open(&t, &model, NULL, &e), e));
        memset(&s, 0x55, sizeof s);
        dsv3_model_sampling(model, &s);
        CHECK(s.temperature == 0 && s.top_p == 0 && s.top_k == 0 && s.seed == 0);
        done();
    }
}

TEST(refuses_what_it_does_not_run)
{
    tiny_opts m = tiny_micro();
    refused(m, "model_type", "\"llama\"", "model_type");
    refused(m, "model_type", "\"deepseek_v32\"", "model_type");
    refused(m, "model_type", NULL, "model_type");
    refused(m, "hidden_act", "\"gelu\"", "hidden_act");
    refused(m, "attention_bias", "true", "attention_bias");
    refused(m, "moe_layer_freq", "2", "moe_layer_freq");
    refused(m, "num_key_value_heads", "1", "num_key_value_heads");
    refused(m, "kv_lora_rank", NULL, "kv_lora_rank");
    refused(m, "kv_lora_rank", "null", "kv_lora_rank");
    refused(m, "index_topk", "2048", "index_topk");
    refused(m, "text_config", "{\"model_type\": \"deepseek_v3\"}", "text_config");
    refused(m, "scoring_func", "\"tanh\"", "scoring_func");
    refused(m, "topk_method", "\"random\"", "topk_method");
    refused(m, "topk_method", "\"greedy\"", "topk_method");
    refused(m, "scoring_func", "\"softmax\"", "scoring_func");
}

TEST(refuses_rope)
{
    tiny_opts m = tiny_micro();
    static const char *const types[] = {"linear", "dynamic", "llama3", "longrope", "Yarn"};
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++) {
        char value[200];
        snprintf(value, sizeof value, "{\"type\": \"%s\", \"factor\": 4, \"original_max_position_embeddings\": 16}", types[i]);
        refused(m, "rope_scaling", value, types[i]);
        snprintf(value, sizeof value, "{\"rope_type\": \"%s\", \"factor\": 4, \"original_max_position_embeddings\": 16}", types[i]);
        refused(m, "rope_scaling", value, types[i]);
    }
    refused(m, "rope_scaling", "{\"type\": \"yarn\", \"factor\": 4}", "original_max_position_embeddings");
    refused(m, "rope_scaling", "{\"type\": \"yarn\", \"factor\": 4, \"original_max_position_embeddings\": 16, \"truncate\": false}", "truncate");
    wrong("rope_scaling", "{\"type\": \"yarn\", \"factor\": -4, \"original_max_position_embeddings\": 16}");
    wrong("rope_scaling", "{\"type\": \"yarn\", \"factor\": 1e400, \"original_max_position_embeddings\": 16}");
    wrong("rope_scaling", "{\"type\": \"yarn\", \"factor\": NaN, \"original_max_position_embeddings\": 16}");
    wrong("rope_scaling", "{\"type\": \"yarn\", \"factor\": \"4\", \"original_max_position_embeddings\": 16}");
    wrong("rope_scaling", "\"yarn\"");
    wrong("rope_scaling", "[]");
    wrong("rope_theta", "0");
    wrong("rope_theta", "-10000");
    wrong("rope_theta", "1e400");
    wrong("rope_theta", "NaN");
    wrong("rope_theta", "Infinity");
    wrong("rope_theta", "\"10000\"");
    wrong("rope_interleave", "1");
}

TEST(refuses_quantizations)
{
    tiny_opts m = tiny_micro();
    static const struct {
        const char *value, *named;
    } cases[] = {
        {"{\"quant_method\": \"awq\", \"bits\": 4, \"group_size\": 64}", "awq"},
        {"{\"quant_method\": \"gptq\", \"bits\": 4}", "gptq"},
        {"{\"quant_method\": \"compressed-tensors\", \"format\": \"pack-quantized\", \"config_groups\": {\"group_0\": {\"targets\": [\"Linear\"]}}}", "compressed-tensors"},
        {"{\"quant_method\": \"fp8\", \"fmt\": \"e5m2\", \"weight_block_size\": [128, 128]}", "e5m2"},
        {"{\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \"weight_block_size\": [64, 64]}", "weight_block_size"},
        {"{\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \"weight_block_size\": [128]}", "weight_block_size"},
        {"{\"quant_method\": \"fp8\", \"fmt\": \"e4m3\", \"weight_block_size\": [128, 128, 128]}", "weight_block_size"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        refused(m, "quantization_config", cases[i].value, cases[i].named);
    CHECK_OK(open_with(m, "quantization_config", "null"), e); /* every tensor says its own dtype */
    done();
}

/* What is read of INT8: compressed-tensors' W8A8, and the two methods of the published R1 sets. */
TEST(reads_int8_quantizations)
{
    static const char *const good[][2] = {
        {TINY_W8A8, "compressed-tensors"},
        {"{\"quant_method\": \"compressed-tensors\", \"format\": \"naive-quantized\", \"config_groups\": {\"group_0\": {\"weights\": {\"strategy\": \"channel\"}, "
         "\"input_activations\": null, \"format\": \"int-quantized\"}, \"group_1\": {\"weights\": null}}, \"transform_config\": {}, \"ignore\": []}", "compressed-tensors"},
        {"{\"quant_method\": \"compressed-tensors\", \"format\": \"int-quantized\", \"config_groups\": {\"group_0\": {\"weights\": {\"strategy\": \"block\", "
         "\"block_structure\": \"128x128\", \"actorder\": false}}}}", "compressed-tensors"},
        {"{\"quant_method\": \"blockwise_int8\", \"activation_scheme\": \"dynamic\", \"weight_block_size\": [128, 128], \"ignored_layers\": [\"lm_head\"]}", "blockwise_int8"},
        {"{\"quant_method\": \"blockwise_int8\"}", "blockwise_int8"},
        {"{\"quant_method\": \"w8a8_int8\", \"is_dynamic\": true}", "w8a8_int8"},
    };
    tiny_opts o = tiny_micro();
    o.dtype = DSV3_DTYPE_BF16;
    for (size_t i = 0; i < sizeof good / sizeof good[0]; i++) {
        if (CHECK_OK(open_with(o, "quantization_config", good[i][0]), e))
            CHECK_EQ_STR(dsv3_model_config(model)->quant_method, good[i][1]);
        else
            printf("    case %d\n", (int)i);
        done();
    }
}

/* One word of W8A8's configuration changed at a time. */
TEST(refuses_int8_quantizations)
{
    static const char *const cases[][3] = {
        {"\"strategy\": \"channel\"", "\"strategy\": \"group\"", "weights.strategy is \"group\""},
        {"\"strategy\": \"channel\"", "\"strategy\": \"tensor\"", "weights.strategy"},
        {"\"strategy\": \"channel\", ", "", "weights.strategy"},
        {"\"strategy\": \"channel\"", "\"strategy\": \"block\"", "block_structure is missing"},
        {"\"weights\": {\"actorder\": null, \"block_structure\": null", "\"weights\": {\"block_structure\": [128, 128]", "block_structure is given"},
        {"\"weights\": {\"actorder\": null, \"block_structure\": null", "\"weights\": {\"block_structure\": [128, 32]", "block_structure is [128, 32]"},
        {"\"weights\": {\"actorder\": null, \"block_structure\": null", "\"weights\": {\"block_structure\": \"64x64x\"", "block_structure"},
        {"\"weights\": {\"actorder\": null", "\"weights\": {\"actorder\": \"weight\"", "weights.actorder"},
        {"\"num_bits\": 8, \"observer\": \"minmax\"", "\"num_bits\": 4", "weights.num_bits is 4"},
        {"\"num_bits\": 8, \"observer\": \"minmax\"", "\"num_bits\": {\"self_attn\": 16}", "weights.num_bits"},
        {"\"num_bits\": 8, \"observer\": null", "\"num_bits\": 4", "input_activations.num_bits is 4"},
        {"\"symmetric\": true, \"type\": \"int\"}}}", "\"symmetric\": false, \"type\": \"int\"}}}", "weights.symmetric is false"},
        {"\"symmetric\": true, \"type\": \"int\"}, \"output", "\"symmetric\": false, \"type\": \"int\"}, \"output", "input_activations.symmetric"},
        {"\"type\": \"int\"}}}", "\"type\": \"float\"}}}", "weights.type is \"float\""},
        {"\"dynamic\": true", "\"dynamic\": false", "input_activations.dynamic is false"},
        {"\"dynamic\": true", "\"dynamic\": \"local\"", "input_activations.dynamic"},
        {"\"dynamic\": false", "\"dynamic\": true", "weights.dynamic is true"},
        {"\"output_activations\": null", "\"output_activations\": {\"num_bits\": 8}", "output_activations"},
        {"\"kv_cache_scheme\": null", "\"kv_cache_scheme\": {\"num_bits\": 8}", "kv_cache_scheme"},
        {"\"kv_cache_scheme\": null", "\"transform_config\": {\"config_groups\": {\"u\": 1}}", "transform_config"},
        {"\"format\": \"int-quantized\"", "\"format\": \"pack-quantized\"", "format is \"pack-quantized\""},
        {"\"format\": \"int-quantized\", ", "", "format is \"\""},
        {"{\"config_groups\": {\"group_0\": {", "{\"config_groups\": {\"group_0\": {\"format\": \"pack-quantized\", ", "format of a group"},
        {"{\"config_groups\": {", "{\"config_groups\": {\"a\": {\"weights\": {\"strategy\": \"block\", \"block_structure\": [128, 128]}}, ", "differs between the groups"},
    };
    static const char w8a8[] = TINY_W8A8;
    char text[2000];
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *at = strstr(w8a8, cases[i][0]);
        if (!CHECK(at != NULL))
            continue;
        snprintf(text, sizeof text, "%.*s%s%s", (int)(at - w8a8), w8a8, cases[i][1], at + strlen(cases[i][0]));
        refused(tiny_micro(), "quantization_config", text, cases[i][2]);
    }
    refused(tiny_micro(), "quantization_config", "{\"quant_method\": \"blockwise_int8\", \"activation_scheme\": \"static\"}", "activation_scheme");
    refused(tiny_micro(), "quantization_config", "{\"quant_method\": \"blockwise_int8\", \"weight_block_size\": [128, 100]}", "weight_block_size");
    refused(tiny_micro(), "quantization_config", "{\"quant_method\": \"blockwise_int8\", \"weight_block_size\": [0, 128]}", "weight_block_size");
    wrong("quantization_config", "{\"quant_method\": \"compressed-tensors\", \"format\": \"int-quantized\", \"config_groups\": []}");
    wrong("quantization_config", "{\"quant_method\": \"compressed-tensors\", \"format\": \"int-quantized\", \"config_groups\": {\"a\": 1}}");
}

TEST(refuses_impossible_combinations)
{
    tiny_opts m = tiny_micro(), v2 = tiny_v2();
    refused(v2, "norm_topk_prob", "true", "norm_topk_prob");
    refused(m, "n_group", "3", "n_group");
    refused(m, "n_group", "4", "group"); /* two experts a group are wanted */
    refused(m, "topk_group", "3", "topk_group");
    refused(m, "topk_group", "0", "topk_group");
    refused(m, "num_experts_per_tok", "3", "num_experts_per_tok"); /* one group of two */
    refused(m, "num_experts_per_tok", "0", "num_experts_per_tok");
    refused(m, "qk_rope_head_dim", "5", "qk_rope_head_dim");
}

/* Sizes of nothing, below nothing, and beyond all: refused before anything is allocated by them. */
TEST(refuses_sizes)
{
    static const char *const sizes[] = {"vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
                                        "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                                        "n_routed_experts", "max_position_embeddings"};
    static const char *const values[] = {"0", "-1", "1.5", "4294967296", "18446744073709551616", "1e30", "\"16\"", "[16]", "NaN", "true"};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        for (size_t k = 0; k < sizeof values / sizeof values[0]; k++) {
            if (strcmp(sizes[i], "n_routed_experts") == 0 && k == 0)
                continue; /* none: a dense model, which the tensors contradict */
            wrong(sizes[i], values[k]);
        }
        if (strcmp(sizes[i], "max_position_embeddings") != 0) {
            wrong(sizes[i], "4294967295");
            wrong(sizes[i], "2147483647");
            wrong(sizes[i], "65536");
        }
    }
    static const char *const also[] = {"first_k_dense_replace", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "num_nextn_predict_layers"};
    for (size_t i = 0; i < sizeof also / sizeof also[0]; i++) {
        wrong(also[i], "-1");
        wrong(also[i], "1.5");
        wrong(also[i], "4294967296");
        wrong(also[i], "\"1\"");
    }
    wrong("rms_norm_eps", "-1e-6");
    wrong("rms_norm_eps", "NaN");
    wrong("rms_norm_eps", "1e400");
    wrong("routed_scaling_factor", "NaN");
    wrong("routed_scaling_factor", "1e400");
    wrong("tie_word_embeddings", "\"no\"");
    wrong("norm_topk_prob", "1");
    wrong("model_type", "3");
    wrong("model_type", "\"a model type whose name is longer than any field that could hold it\"");
}

/* More layers than tensors, dense layers where experts are, experts that are not there: the tensor is named. */
TEST(config_against_tensors)
{
    CHECK_RESULT(open_with(tiny_micro(), "num_hidden_layers", "3"), DSV3_ERROR_MISSING_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.layers.2.");
    done();
    CHECK_RESULT(open_with(tiny_micro(), "first_k_dense_replace", "2"), DSV3_ERROR_MISSING_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.layers.1.mlp");
    done();
    CHECK_RESULT2(open_with(tiny_micro(), "n_routed_experts", "8"), DSV3_ERROR_MISSING_TENSOR, DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "mlp.");
    done();
    CHECK_RESULT(open_with(tiny_micro(), "vocab_size", "31"), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.embed_tokens.weight");
    CHECK_CONTAINS(e.message, "31");
    CHECK_CONTAINS(e.message, "32");
    done();
    CHECK_RESULT(open_with(tiny_micro(), "intermediate_size", "17"), DSV3_ERROR_BAD_TENSOR, e);
    CHECK_CONTAINS(e.message, "model.layers.0.mlp.");
    done();
    build(tiny_micro()); /* a head is missing, and nobody said it is the embedding */
    tiny_remove(&t, "lm_head.weight");
    tiny_pack(&t);
    CHECK_RESULT(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_MISSING_TENSOR, e);
    CHECK_CONTAINS(e.message, "lm_head.weight");
    done();
}

TEST(not_json)
{
    static const struct {
        const char *text;
        uint64_t at;
    } cases[] = {{"", 0}, {"{\"vocab_size\": }", 15}, {"{\"vocab_size\": 32", 17}, {"[]", 0}, {"{\"a\": 1} x", 9}, {"{\"hidden_act\": \"si\xfflu\"}", 18}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        build(tiny_micro());
        tiny_put(&t, "config.json", cases[i].text, strlen(cases[i].text));
        CHECK_RESULT(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_JSON, e);
        CHECK_EQ_UINT(e.offset, cases[i].at);
        CHECK_CONTAINS(e.message, "config.json");
        done();
    }
}

/* Two readers could disagree about a key that is there twice. */
TEST(duplicate_keys)
{
    static const char *const keys[] = {"vocab_size", "hidden_size", "rms_norm_eps", "model_type", "rope_theta"};
    for (size_t i = 0; i < sizeof keys / sizeof keys[0]; i++) {
        char first[64], twice[200];
        build(tiny_micro());
        snprintf(first, sizeof first, "\"%s\": ", keys[i]);
        snprintf(twice, sizeof twice, "\"%s\": 32, \"%s\": ", keys[i], keys[i]);
        if (strcmp(keys[i], "model_type") == 0)
            snprintf(twice, sizeof twice, "\"model_type\": \"deepseek_v3\", \"model\\u005ftype\": ");
        CHECK(tiny_replace(&t, "config.json", first, twice));
        dsv3_result r = tiny_open(&t, &model, NULL, &e);
        if (r == DSV3_OK || !CHECK_CONTAINS(e.message, keys[i]))
            CHECK_RESULT(r, DSV3_ERROR_UNSUPPORTED_MODEL, e);
        done();
    }
    CHECK_OK(open_with(tiny_micro(), "auto_map", "{\"a\": 1, \"a\": 2}"), e); /* where nobody reads */
    done();
}

/* A damaged companion is told, not passed over. */
TEST(companions)
{
    build(tiny_micro());
    tiny_put(&t, "generation_config.json", "{\"temperature\": ", 16);
    CHECK_RESULT(tiny_open(&t, &model, NULL, &e), DSV3_ERROR_JSON, e);
    CHECK_CONTAINS(e.message, "generation_config.json");
    done();
    static const char *const bad[] = {"\"temperature\": -1", "\"temperature\": 1e400", "\"top_p\": \"a\"", "\"top_k\": -5", "\"top_p\": 2", "\"min_p\": -1",
                                      "\"repetition_penalty\": -2", "\"top_k\": 1e30", "\"top_p\": NaN"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) { /* an error, or values that sampling takes */
        build(tiny_micro());
        char text[100];
        snprintf(text, sizeof text, "{\"do_sample\": true, %s}", bad[i]);
        tiny_put(&t, "generation_config.json", text, strlen(text));
        dsv3_result r = tiny_open(&t, &model, NULL, &e);
        if (r == DSV3_OK) {
            dsv3_session *s = NULL;
            dsv3_sample_opts sampling;
            dsv3_sample sample;
            int32_t id = 3;
            dsv3_model_sampling(model, &sampling);
            CHECK_OK(dsv3_session_open(&s, model, NULL, &e), e);
            CHECK_OK(dsv3_session_append(s, &id, 1, NULL, &e), e);
            if (!CHECK_OK(dsv3_session_sample(s, &sampling, &sample, &e), e))
                printf("    with %s\n", bad[i]);
            dsv3_session_close(s);
        } else {
            CHECK_CONTAINS(e.message, "generation_config.json");
        }
        done();
    }
}

TEST_MAIN(RUN(reads_every_field), RUN(reads_the_v2_family), RUN(defaults), RUN(spellings), RUN(q_lora_rank), RUN(eos_ids),
          RUN(generation_defaults), RUN(refuses_what_it_does_not_run), RUN(refuses_rope), RUN(refuses_quantizations), RUN(reads_int8_quantizations),
          RUN(refuses_int8_quantizations),
          RUN(refuses_impossible_combinations), RUN(refuses_sizes), RUN(config_against_tensors), RUN(not_json), RUN(duplicate_keys),
          RUN(companions))
