#!/bin/sh
# The program as its users and their scripts meet it. DSV3: the program (build/dsv3). Run from the top of the repository.

dsv3=${DSV3:-build/dsv3}
model=examples/tiny
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
passed=0 failed=0 skipped=0

# A test is a function that prints what is wrong, or nothing.
run() {
    wrong=$("$1" 2>&1)
    if [ -z "$wrong" ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf '%s: %s\n' "$1" "$wrong" | head -n 12
    fi
}

# call STATUS ARGUMENTS: stdout and stderr are in $work/out and $work/err, stdin is the caller's. A program that gives up
# in the middle frees nothing, on purpose: under ASan only one that ends well is asked for leaks.
call() {
    want=$1
    shift
    ASAN_OPTIONS=detect_leaks=$((want == 0)) "$dsv3" "$@" > "$work/out" 2> "$work/err"
    got=$?
    [ $got -eq "$want" ] || { echo "dsv3 $*: expected status $want, found $got:"; head -n 5 "$work/err"; }
}

# The error of the last call: one line, nothing on stdout, with these words.
one_line() {
    [ "$(wc -l < "$work/err")" -eq 1 ] || { echo "expected one line on stderr, found:"; cat "$work/err"; }
    [ -s "$work/out" ] && echo "stdout is not empty: $(head -c 80 "$work/out")"
    for word in "dsv3: " "$@"; do
        grep -qF -e "$word" "$work/err" || echo "no '$word' in: $(cat "$work/err")"
    done
}

quiet() { [ -s "$work/err" ] && { echo "expected silence on stderr, found:"; cat "$work/err"; }; }

same() { # WHAT FOUND EXPECTED
    [ "$2" = "$3" ] || printf "%s: expected '%s', found '%s'\n" "$1" "$3" "$2"
}

size() { wc -c < "$1" | tr -d ' '; }

wrong_use() {
    call 2 && one_line "dsv3 -h"
    call 2 frobnicate && one_line frobnicate
    for command in chat generate tokenize detokenize render logits inspect quantize experts; do
        call 2 $command && one_line $command DIR
        call 2 $command $model --frobnicate && one_line --frobnicate "dsv3 $command -h"
    done
    call 2 generate $model a b && one_line "'b'"
    call 2 generate $model a -f b && one_line "-f FILE"
    call 2 generate $model a -n && one_line "-n wants"
    call 2 generate $model a -n x && one_line "'x'"
    call 2 generate $model a -n -5 && one_line "'-5'"
    call 2 generate $model a -n 4294967296 && one_line "-n wants"
    call 2 generate $model a --temp nan && one_line "--temp wants"
    call 2 generate $model a --top-p 1.5 && one_line "--top-p wants" "from 0 to 1"
    call 2 generate $model a --seed 18446744073709551616 && one_line "--seed wants"
    call 2 generate $model a --isa mmx && one_line "avx512"
    call 2 generate $model a --spacing two && one_line "--spacing two"
    call 1 generate $model a --json-schema "$work/none" && one_line "$work/none"
    call 2 generate $model a --greedy=1 && one_line "--greedy takes no value"
    call 2 generate $model "1 two 3" --ids && one_line "'two'"
    call 2 generate $model "" --ids && one_line "--ids"
    call 2 logits $model --ids x && one_line --out
    call 2 logits $model --ids /dev/null --out x && one_line "at least one"
    call 2 quantize $model --to int8 && one_line "into which directory"
    call 2 quantize $model "$work/never" && one_line "--to wants int8, fp8 or bf16"
    call 2 quantize $model "$work/never" --to int4 && one_line "found 'int4'"
    call 2 render $model --markup v4 && one_line "found 'v4'" "kimi-k2"
    call 2 chat $model --markup v4 && one_line "found 'v4'"
    call 2 chat $model --think --no-think && one_line "one of them"
    [ -e "$work/never" ] && echo "wrong use makes a directory"
}

help() {
    call 0 -h && quiet
    for command in chat generate tokenize detokenize render logits inspect quantize experts; do
        grep -q "dsv3 $command DIR" "$work/out" || echo "-h does not name $command"
    done
    for command in chat generate tokenize detokenize render logits inspect quantize experts; do
        "$dsv3" $command -h > "$work/help" || echo "$command -h: status $?"
        grep -q "dsv3 $command DIR" "$work/help" || echo "$command -h says: $(cat "$work/help")"
        "$dsv3" $command $model --help | cmp - "$work/help"
    done
    call 0 --version
    same version "$(cat "$work/out")" "dsv3 $(sed -n 's/^#define DSV3_VERSION_STRING "\(.*\)"/\1/p' dsv3.h)"
}

not_there() {
    for command in "generate $work/none hello" "inspect $work/none" "logits $work/none --ids $work/one --out $work/x"; do
        echo 1 > "$work/one"
        call 1 $command && one_line config.json
    done
    for command in tokenize detokenize; do
        call 1 $command "$work/none" < /dev/null && one_line tokenizer.json
    done
    call 1 generate $model -f "$work/none" && one_line "$work/none"
    call 1 logits $model --ids "$work/none" --out "$work/x" && one_line "$work/none"
    call 1 logits $model --ids "$work/one" --out "$work/none/x" && one_line "$work/none/x"
}

generates() {
    call 0 generate $model "Once upon a time" -n 20 --greedy && quiet
    cp "$work/out" "$work/greedy"
    [ "$(size "$work/greedy")" -gt 10 ] || echo "hardly any text: $(cat "$work/greedy")"
    same "last byte" "$(tail -c 1 "$work/greedy" | od -An -tu1 | tr -d ' ')" 10
    printf 'Once upon a time' > "$work/prompt"
    call 0 generate $model -f "$work/prompt" -n 20 --greedy && cmp "$work/out" "$work/greedy"
    call 0 generate $model - -n 20 --temp=0 < "$work/prompt" && cmp "$work/out" "$work/greedy"
    call 0 generate --greedy --threads 1 --isa scalar -n 20 -- $model "Once upon a time" && cmp "$work/out" "$work/greedy"
    call 0 tokenize $model --bos < "$work/prompt"
    cp "$work/out" "$work/ids"
    call 0 generate $model --ids -f "$work/ids" -n 20 --greedy && cmp "$work/out" "$work/greedy"
    call 0 generate $model --ids "$(cat "$work/ids")" -n 20 --greedy && cmp "$work/out" "$work/greedy"
    call 0 generate $model -n 5 && quiet
}

json_output() {
    printf '{"type":"array","items":{"enum":["cat","dog"]},"minItems":2,"maxItems":2}' > "$work/schema"
    call 0 generate $model "Once" --json-schema "$work/schema" --temp 1.5 --seed 3 --spacing none && quiet
    grep -qE '^\["(cat|dog)","(cat|dog)"\]$' "$work/out" || echo "does not fit: $(cat "$work/out")"
    call 0 generate $model "Once" --json-output --temp 1.5 --seed 3 -n 20
    [ "$(head -c 1 "$work/out")" = "{" ] || echo "no object: $(cat "$work/out")"
    printf '{"type":"array","unique":true}' > "$work/schema"
    call 1 generate $model "Once" --json-schema "$work/schema" && one_line "/unique"
    call 2 generate $model "Once" --json-schema "$work/schema" --json-output && one_line "one of them"
}

# A text in two runs is the text in one; the second continuation of two is the text of its seed.
sessions() {
    call 0 generate $model "Once upon a time" -n 20 --seed 7 && head -c -1 "$work/out" > "$work/whole"
    call 0 generate $model "Once upon a time" -n 9 --seed 7 --session "$work/s" && head -c -1 "$work/out" > "$work/parts"
    call 0 generate $model -n 11 --seed 7 --session "$work/s" && head -c -1 "$work/out" >> "$work/parts"
    cmp "$work/parts" "$work/whole"
    [ -e "$work/s.part" ] && echo "$work/s.part was left behind"
    call 1 generate $model -n 1 --session "$work/s" --context 20 && one_line "$work/s" "holds 20"
    head -c 1000 "$work/s" > "$work/cut"
    call 1 generate $model -n 1 --session "$work/cut" && one_line "$work/cut" "snapshot"
    call 0 generate $model "Once upon a time" -n 20 --seed 6 --parallel 2
    sed '1,/--- seed 7/d' "$work/out" | head -c -1 | cmp - "$work/whole"
    same "texts" "$(grep -c '^--- seed' "$work/out")" 2
    call 0 generate $model "Once upon a time" -n 5 --seed 6 --parallel 3 --json
    same "lines" "$(grep -c '"seed":[678].*"ids":\[.*"stop":"max_tokens"' "$work/out")" 3
    call 2 generate $model "Once" --parallel 2 --session "$work/s" && one_line "--parallel"
    call 2 generate $model "Once" --parallel 2 --draft 2 && one_line "--draft"
    call 2 generate "$work/none" "Once" --draft 17 && one_line "--draft 17"
    call 2 generate "$work/none" "Once" --drafter best && one_line "--drafter best"
}

experts() {
    printf 'Once upon a time there was a king who had a daughter, and she was very beautiful.' > "$work/prompt"
    call 0 experts $model -f "$work/prompt" --svg "$work/svg" && grep -q '^mean' "$work/out" || echo "no mean"
    grep -q '</svg>' "$work/svg" || echo "no picture"
    call 0 experts $model --json < "$work/prompt" && cp "$work/out" "$work/biased"
    grep -q '"bias":true.*"layer":3.*"reuse_by_chance":0.25' "$work/out" || echo "no figures: $(head -c 200 "$work/out")"
    call 0 experts $model --json --no-bias -f "$work/prompt" && grep -q '"bias":false' "$work/out" || echo "no figures"
    cmp -s "$work/out" "$work/biased" && echo "the bias changes nothing"
}

seeds() {
    call 0 generate $model "Once" -n 30 --temp 1.5 --seed 1 && cp "$work/out" "$work/1"
    call 0 generate $model "Once" -n 30 --temp 1.5 --seed 1 && cmp "$work/out" "$work/1"
    call 0 generate $model "Once" -n 30 --temp 1.5 --seed 2 && cmp -s "$work/out" "$work/1" && echo "two seeds, one text"
    call 0 generate $model "Once" -n 30 --temp 1.5 --top-k 1 --seed 3 && cp "$work/out" "$work/1"
    call 0 generate $model "Once" -n 30 --greedy && cmp "$work/out" "$work/1"
    call 0 generate $model "Once" -n 30 --seed 4 && cp "$work/out" "$work/1"
    temperature=$(sed -n 's/.*"temperature": *\([0-9.]*\).*/\1/p' $model/generation_config.json)
    top_p=$(sed -n 's/.*"top_p": *\([0-9.]*\).*/\1/p' $model/generation_config.json)
    call 0 generate $model "Once" -n 30 --seed 4 --temp "$temperature" --top-p "$top_p" && cmp "$work/out" "$work/1"
}

stops() {
    call 0 generate $model "Once upon a time" -n 40 --greedy
    text=$(cat "$work/out")
    word=$(printf %s "$text" | cut -c 12-19)
    call 0 generate $model "Once upon a time" -n 40 --greedy --stop "$word" --stop "no such words"
    same "text before '$word'" "$(cat "$work/out")" "${text%%"$word"*}"
    call 0 generate $model "Once upon a time" -n 40 --greedy --stop "$word" --json
    tail -n 1 "$work/out" | grep -q '"stop":"string"' || echo "stats: $(tail -n 1 "$work/out")"
    call 1 generate $model "Once upon a time there was a king" --context 4 && one_line --context
    call 0 generate $model "Once" --context 12 -n 0 --ignore-eos --greedy --json
    tail -n 1 "$work/out" | grep -q '"stop":"context"' || echo "stats: $(tail -n 1 "$work/out")"
}

json_tokens() {
    call 0 generate $model "Once upon a time" -n 12 --greedy --ignore-eos --json && quiet
    same lines "$(wc -l < "$work/out" | tr -d ' ')" 13
    same tokens "$(grep -c '^{"id":[0-9]*,"text":".*","logprob":-*[0-9.e-]*}$' "$work/out")" 12
    tail -n 1 "$work/out" | grep -q '^{"stats":{"n_prompt":[0-9]*,"n_generated":12,.*"prompt_seconds":.*"decode_seconds":.*"tokens_per_second":.*"stop":"max_tokens"' ||
        echo "stats: $(tail -n 1 "$work/out")"
    sed -n 's/^{"id":\([0-9]*\),.*/\1/p' "$work/out" > "$work/ids"
    sed -n 's/^{"id":[0-9]*,"text":"\(.*\)","logprob".*/\1/p' "$work/out" | tr -d '\n' > "$work/pieces"
    call 0 generate $model "Once upon a time" -n 12 --greedy --ignore-eos
    same "texts joined" "$(sed 's/\\n/ /g; s/\\"/"/g' "$work/pieces")" "$(tr '\n' ' ' < "$work/out" | sed 's/ $//')"
    cp "$work/out" "$work/text"
    call 0 detokenize $model < "$work/ids"
    echo >> "$work/out"
    cmp "$work/out" "$work/text"
}

interrupted() {
    text=$work/interrupted # of its own: the shell goes on before the program has emptied it
    "$dsv3" generate $model "Once" -n 0 --context 2048 --ignore-eos --greedy > "$text" 2> "$work/err" &
    child=$!
    tries=0
    while [ ! -s "$text" ] && [ $tries -lt 600 ]; do sleep 0.05; tries=$((tries + 1)); done
    kill -INT $child
    wait $child
    same "status after Ctrl-C" $? 130
    quiet
    [ "$(size "$text")" -gt 1 ] || echo "no text"
    same "last byte" "$(tail -c 1 "$text" | od -An -tu1 | tr -d ' ')" 10
}

tokens() {
    printf 'Es war einmal: ein K\303\266nig,\n\ttwo 12345 \344\275\240\345\245\275 \360\237\221\221  \n' > "$work/text"
    call 0 tokenize $model < "$work/text" && quiet
    same lines "$(wc -l < "$work/out" | tr -d ' ')" 1
    grep -qE '^[0-9]+( [0-9]+)*$' "$work/out" || echo "ids: $(cat "$work/out")"
    cp "$work/out" "$work/ids"
    call 0 detokenize $model < "$work/ids" && quiet
    cmp "$work/out" "$work/text"
    call 0 tokenize $model --bos < "$work/text"
    same "BOS in front" "$(cat "$work/out")" "0 $(cat "$work/ids")"
    cp "$work/out" "$work/bos"
    call 0 detokenize $model --skip-special < "$work/bos" && cmp "$work/out" "$work/text"
    call 0 tokenize $model < /dev/null
    same "ids of nothing" "$(cat "$work/out")" ""
    call 0 detokenize $model < /dev/null
    same "text of nothing" "$(size "$work/out")" 0
    call 2 detokenize $model < "$work/text" && one_line "'Es'"
    bos=$(echo 0 | "$dsv3" detokenize $model)
    printf %s "$bos" | "$dsv3" tokenize $model --parse-special > "$work/out"
    same "a marker asked for" "$(cat "$work/out")" 0
    printf %s "$bos" | "$dsv3" tokenize $model > "$work/out"
    grep -qE '^[0-9]+( [0-9]+)+$' "$work/out" || echo "a marker as text: $(cat "$work/out")"
    mkdir "$work/files" && cp $model/tokenizer.json $model/tokenizer_config.json "$work/files"
    call 0 tokenize "$work/files" < "$work/text" && cmp "$work/out" "$work/ids"
}

json_lines() {
    hi=$(printf hi | "$dsv3" tokenize $model | tr ' ' ,)
    king=$(printf '\360\237\221\221' | "$dsv3" tokenize $model | tr ' ' ,)
    cat > "$work/in" <<'END'
{"text":"hi"}
{"other":{"a":[1,-2.5e3,{"b":null}],"c":"\"]}"}, "text" : "h\u0069","add_special_tokens":false}
{"text":"hi","add_special_tokens":true,"parse_special":true}
{"text":"\ud83d\udc51"}
{"text":"\uD83d","b":"c"}
{"text":"\udc51\ud83d"}
{"text":"\ud83dx"}
{"text":""}

{"text":"a
{"text":"a"} b
{"text":"a",}
{"text":"a" "b":1}
{"text":12}
{"tex":"a"}
[1]
{"text":"\q"}
{"text":"a","parse_special":1}
{"text":"\"\\\/\b\f\n\r\t"}
END
    printf '{"text":"no newline at the end"}' >> "$work/in"
    call 0 tokenize $model --jsonl < "$work/in" && quiet
    same "a line out for a line in" "$(wc -l < "$work/out" | tr -d ' ')" 20
    same "a text" "$(sed -n 1p "$work/out")" "{\"ids\":[$hi]}"
    same "unknown keys, escapes" "$(sed -n 2p "$work/out")" "{\"ids\":[$hi]}"
    same "BOS" "$(sed -n 3p "$work/out")" "{\"ids\":[0,$hi]}"
    same "a surrogate pair" "$(sed -n 4p "$work/out")" "{\"ids\":[$king]}"
    same "an empty text" "$(sed -n 8p "$work/out")" "{\"ids\":[]}"
    same "bad lines" "$(sed -n '5,7p;9,18p' "$work/out" | grep -c '^{"error":"..*"}$')" 13
    same "good lines" "$(grep -c '^{"ids":\[[0-9,]*\]}$' "$work/out")" 7
    sed -n 19p "$work/out" > "$work/back"
    "$dsv3" detokenize $model --jsonl < "$work/back" > "$work/out"
    same "escapes and back" "$(cat "$work/out")" '{"text":"\"\\/\u0008\u000c\n\u000d\u0009"}'
    cat > "$work/in" <<'END'
{"ids":[0],"skip_special_tokens":true}
{"ids":[ 0 , 1 ],"skip_special_tokens":true,"text":"x"}
{"ids":[]}
{"ids":[99999999]}
{"ids":[-1]}
{"ids":[2147483648]}
{"ids":[1.5]}
{"ids":[1,]}
{"ids":7}
{"text":"x"}
END
    call 0 detokenize $model --jsonl < "$work/in" && quiet
    same "texts" "$(grep -c '^{"text":""}$' "$work/out")" 4
    same "bad lines" "$(sed -n '5,10p' "$work/out" | grep -c '^{"error":"..*"}$')" 6
}

logits() {
    awk 'BEGIN { for (i = 0; i < 40; i++) print (i * 37 + 11) % 4096 }' > "$work/ids"
    call 0 logits $model --ids "$work/ids" --out "$work/a" --experts "$work/e" && quiet
    [ -s "$work/out" ] && echo "stdout is not empty"
    same "logits' size" "$(size "$work/a")" $((40 * 4096 * 4))
    layers=$(sed -n 's/.*"num_hidden_layers": *\([0-9]*\).*/\1/p' $model/config.json)
    dense=$(sed -n 's/.*"first_k_dense_replace": *\([0-9]*\).*/\1/p' $model/config.json)
    top=$(sed -n 's/.*"num_experts_per_tok": *\([0-9]*\).*/\1/p' $model/config.json)
    same "experts' size" "$(size "$work/e")" $((40 * (layers - dense) * top * 4))
    od -An -v -td4 -w$((top * 4)) "$work/e" | awk '{ for (i = 1; i <= NF; i++) if ($i < 0 || $i > 15 || (i > 1 && $i <= $(i - 1))) bad = 1 } END { if (bad) print "experts are not ascending ids" }'
    for how in "--rows 1" "--rows 7 --threads 1" "--rows 512 --threads 3" "--isa scalar --threads 8"; do
        call 0 logits $model --ids "$work/ids" --out "$work/b" --experts "$work/f" $how
        cmp "$work/a" "$work/b" && cmp "$work/e" "$work/f" || echo "with $how"
    done
    "$dsv3" logits $model --ids - --out - < "$work/ids" | cmp - "$work/a"
    echo 4096 | "$dsv3" logits $model --ids - --out "$work/b" 2> "$work/err" && echo "an id beyond the vocabulary passes"
    : > "$work/out"
    one_line 4096
}

inspects() {
    call 0 inspect $model && quiet
    for word in model_type deepseek_v3 routed_experts attention F8_E4M3 scales mtp "read for a token" session cache tokenizer 4096; do
        grep -q "$word" "$work/out" || echo "no '$word'"
    done
    grep -q "tokens a second" "$work/out" && echo "a speed without --bandwidth"
    call 0 inspect $model --bandwidth 10 && quiet
    grep -q "tokens a second at 10 GB/s" "$work/out" || echo "--bandwidth has no effect"
    call 0 inspect $model
    lines=$(wc -l < "$work/out")
    call 0 inspect $model --tensors
    tensors=$(($(wc -l < "$work/out") - lines - 1))
    grep -qE '^model.embed_tokens.weight +BF16 +\[4096, [0-9]+\]' "$work/out" || echo "no embedding in --tensors"
    call 0 inspect $model --json --context 100 && quiet
    grep -q "\"tensor_count\":$tensors," "$work/out" || echo "--tensors lists $tensors, --json says: $(grep -o '"tensor_count":[0-9]*' "$work/out")"
    grep -q '"max_tokens":100,' "$work/out" || echo "--context has no effect"
    same lines "$(wc -l < "$work/out" | tr -d ' ')" 1
    per=$(sed -n 's/.*"cache_bytes_per_token":\([0-9]*\).*/\1/p' "$work/out")
    kv=$(sed -n 's/.*"kv_lora_rank":\([0-9]*\).*"qk_rope_head_dim":\([0-9]*\).*/\1 \2/p' "$work/out")
    plans
    [ "$per" -ge $(((${kv% *} + ${kv#* }) * layers_of_tiny * 2)) ] || echo "cache of $per bytes a token"
}
# The plan's kinds are all that is run: with what is not, they sum up to the tensors; and so for a token.
plans() {
    call 0 inspect $model --json --bandwidth 10
    number() { sed -n "s/.*\"$1\":\([0-9.]*\)[,}].*/\1/p" "$work/out"; }
    kinds=$(sed 's/.*"kinds":\[//; s/\].*//' "$work/out" | tr '}' '\n')
    same "kinds of the plan" "$(echo "$kinds" | grep -c '"kind"')" 8
    same "bytes of the plan" "$(echo "$kinds" | sed -n 's/.*"bytes":\([0-9]*\).*/\1/p' | awk -v idle="$(number idle_bytes)" '{ s += $1 } END { print s + idle }')" \
        "$(number tensor_bytes)"
    read=$(echo "$kinds" | sed -n 's/.*"bytes_per_token":\([0-9]*\).*/\1/p' | awk '{ s += $1 } END { print s }')
    same "bytes a token" "$read" "$(sed -n 's/.*"tensor_bytes":[0-9]*,"bytes_per_token":\([0-9]*\).*/\1/p' "$work/out")"
    same "tokens a second" "$(number tokens_per_second)" "$(awk -v b="$read" 'BEGIN { printf "%.6g", 1e10 / b }')"
}
layers_of_tiny=$(sed -n 's/.*"num_hidden_layers": *\([0-9]*\).*/\1/p' $model/config.json)

# tensors DIR KIND: the dtypes of those tensors, in one line.
dtypes() { "$dsv3" inspect "$1" | awk -v kind="$2" '$1 == kind && $2 ~ /^[A-Z]+[0-9]/ && !seen[$2]++ { printf "%s%s", sep, $2; sep = " " } END { print "" }'; }

quantizes() {
    awk 'BEGIN { for (i = 0; i < 40; i++) print (i * 37 + 11) % 4096 }' > "$work/ids"
    call 0 logits $model --ids "$work/ids" --out "$work/a"
    for to in int8 fp8 bf16; do
        call 0 quantize $model "$work/$to" --to $to && quiet
        [ -s "$work/out" ] && echo "stdout is not empty"
        for file in generation_config.json tokenizer.json tokenizer_config.json; do cmp $model/$file "$work/$to/$file"; done
        same "files of $to" "$(ls "$work/$to" | wc -l | tr -d ' ')" 5
        same "norms" "$(dtypes "$work/$to" norms)" BF16
        same "router" "$(dtypes "$work/$to" router)" "F32 BF16"
        same "embedding" "$(dtypes "$work/$to" embedding)" BF16
        same "head" "$(dtypes "$work/$to" head)" BF16
        call 0 logits "$work/$to" --ids "$work/ids" --out "$work/b"
        [ "$(size "$work/a")" = "$(size "$work/b")" ] || echo "logits of $to"
        # the same bytes on any number of threads
        call 0 quantize $model "$work/threads-$to" --to $to --threads 1 && cmp "$work/$to/model.safetensors" "$work/threads-$to/model.safetensors"
    done
    same "int8" "$(dtypes "$work/int8" dense_mlp | tr ' ' '\n' | grep -c I8)" 1
    same "fp8" "$(dtypes "$work/fp8" dense_mlp)" F8_E4M3
    same "bf16" "$(dtypes "$work/bf16" dense_mlp)" BF16
    grep -q '"quant_method": "compressed-tensors"' "$work/int8/config.json" || echo "int8: config.json"
    grep -q '"quant_method": "fp8"' "$work/fp8/config.json" || echo "fp8: config.json"
    grep -q quantization_config "$work/bf16/config.json" && echo "bf16: config.json has a quantization_config"
    # what is BF16 already stays as it is, byte for byte; every pair of formats can be made
    call 0 quantize "$work/bf16" "$work/again" --to bf16 && cmp "$work/bf16/model.safetensors" "$work/again/model.safetensors"
    call 0 quantize "$work/int8" "$work/int8-bf16" --to bf16 && same "int8 to bf16" "$(dtypes "$work/int8-bf16" routed_experts)" BF16
    call 0 quantize "$work/int8" "$work/head" --to fp8 --head && same "head in fp8" "$(dtypes "$work/head" head)" F8_E4M3
    call 0 quantize "$work/head" "$work/no-head" --to int8 && same "head of fp8, not asked for" "$(dtypes "$work/no-head" head)" BF16
    call 0 generate "$work/no-head" "Once" -n 5 --greedy && quiet
}

quantizes_again() {
    call 0 quantize $model "$work/resume" --to int8
    weights=$work/resume/model.safetensors
    cp "$weights" "$work/whole"
    before=$(ls -i "$weights")
    call 0 quantize $model "$work/resume" --to int8 && quiet
    same "a complete file is left alone" "$(ls -i "$weights")" "$before"
    # broken off: no config.json, a part of a file
    rm "$work/resume/config.json"
    head -c 1000000 "$work/whole" > "$weights.part"
    head -c 2000000 "$work/whole" > "$weights"
    call 1 inspect "$work/resume" && one_line config.json
    call 0 quantize $model "$work/resume" --to int8 && cmp "$weights" "$work/whole"
    same "files" "$(ls "$work/resume" | wc -l | tr -d ' ')" 5
    # another format: not over a finished one, but over one that was broken off
    call 1 quantize $model "$work/resume" --to fp8 && one_line "holds another checkpoint"
    cmp "$weights" "$work/whole"
    rm "$work/resume/config.json"
    call 0 quantize $model "$work/resume" --to fp8 && same "fp8" "$(dtypes "$work/resume" dense_mlp)" F8_E4M3
}

quantize_fails() {
    mkdir "$work/own" && cp $model/* "$work/own"
    call 1 quantize "$work/own" "$work/own" --to int8 && one_line "is the checkpoint itself"
    call 1 quantize "$work/own" "$work/../${work##*/}/own/." --to int8 && one_line "is the checkpoint itself"
    for file in $model/*; do cmp "$file" "$work/own/${file##*/}"; done
    echo > "$work/file"
    call 1 quantize $model "$work/file" --to int8 && one_line "not a directory"
    call 1 quantize $model "$work/none/none" --to int8 && one_line "cannot be made"
    call 1 quantize "$work/none" "$work/never" --to int8 && one_line config.json
    [ -e "$work/never" ] && echo "a checkpoint that is not there makes a directory"
    # a disk that is full: a limit on the size of files, whose signal is ignored
    (trap '' XFSZ && ulimit -f 2000 && "$dsv3" quantize $model "$work/full" --to int8 > "$work/out" 2> "$work/err")
    same "status on a full disk" $? 1
    one_line "model.safetensors.part: cannot write"
    same "files left on a full disk" "$(ls "$work/full")" ""
}

full_disk() {
    for command in "inspect $model" "generate $model Once -n 5" "tokenize $model" "logits $model --ids $work/ids --out /dev/full"; do
        echo 1 > "$work/ids"
        "$dsv3" $command < /dev/null > /dev/full 2> "$work/err"
        same "status of $command" $? 1
        : > "$work/out"
        one_line "cannot write"
    done
}

renders() {
    printf '%s\n' '{"messages":[{"role":"user","content":"a<｜User｜>"}],"add_generation_prompt":true}' '{"messages":[{"role":"user"}]}' \
        '{"messages":[{"role":"cat","content":""}]}' '{"messages":[]' '{}' > "$work/lines"
    call 0 render $model --markup v3 --jsonl < "$work/lines" && quiet
    same "lines" "$(wc -l < "$work/out")" 5
    same "rendered" "$(sed -n '1s/.*"rendered":"\([^"]*\)".*/\1/p' "$work/out")" "<｜begin▁of▁sentence｜><｜User｜>a<｜User｜><｜Assistant｜>"
    same "errors" "$(grep -c '^{"error":' "$work/out")" 4
    grep -q "messages\[0\] has no content" "$work/out" || echo "no word of the missing content: $(cat "$work/out")"
    user=$(printf '<｜User｜>' | "$dsv3" tokenize $model --parse-special)
    same "ids of <｜User｜>" "$(sed -n '1s/.*"ids":\[\(.*\)\].*/\1/p' "$work/out" | tr , '\n' | grep -cx "$user")" 1
    printf '{"messages":[{"role":"user","content":"x"}]}' > "$work/one"
    call 0 render $model --markup v3 < "$work/one" && quiet
    same "text alone" "$(cat "$work/out")" "<｜begin▁of▁sentence｜><｜User｜>x"
    call 1 render $model --markup kimi-k2 < "$work/one" && one_line "kimi-k2 needs the token"
}

chats() {
    printf 'Tell me of a fox\n/retry\n/stats\nfirst\\\nsecond\n/save %s\n/undo\n/nonsense\n/quit\nnever\n' "$work/kept" > "$work/lines"
    call 0 chat $model --markup v3 --system "Be brief." --seed 3 -n 12 < "$work/lines"
    for word in "of them there before" "messages   3, a system message first" "taken back; 3 messages" "no such command"; do
        grep -q "$word" "$work/err" || echo "no '$word' in: $(cat "$work/err")"
    done
    [ "$(wc -l < "$work/out")" -ge 3 ] || echo "three answers, found: $(cat "$work/out")"
    call 0 render $model --markup v3 < "$work/kept"
    grep -q "Be brief.<｜User｜>Tell me of a fox<｜Assistant｜>" "$work/out" || echo "saved: $(cat "$work/kept")"
    grep -q "second<｜Assistant｜>" "$work/out" || echo "two lines are no message: $(cat "$work/kept")"
    cp "$work/kept" "$work/session"
    echo "and then?" > "$work/lines"
    call 0 chat $model --markup v3 --session "$work/session" --greedy -n 5 < "$work/lines"
    same "messages kept" "$(grep -c '"role":"user"' "$work/session")" 3
    call 1 chat $model --markup kimi-k2 < /dev/null && one_line "kimi-k2 needs the token" "another --markup"
    echo '{"messages":[{"role":"user","content":"x","tool_calls":[{"function":{"name":"f","arguments":"{}"}}]}]}' > "$work/kept"
    call 1 chat $model --markup v3 --session "$work/kept" < /dev/null && one_line "tool calls"
}

if [ ! -e $model/config.json ]; then
    echo "$model is not there"
    echo "0 passed, 0 failed, 1 skipped"
    exit 0
fi
for test in wrong_use help not_there generates json_output sessions experts seeds stops json_tokens interrupted tokens json_lines renders chats logits inspects quantizes quantizes_again quantize_fails; do
    run $test
done
if [ -w /dev/full ]; then
    run full_disk
else
    skipped=$((skipped + 1))
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
