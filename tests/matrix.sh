#!/bin/bash
# The header under every compiler, standard and switch; the library's symbols; one hash of logits for all builds; aarch64
# under qemu, Windows by cross compiler. Called by `make matrix`, from the top of the repository.
# What is not installed is skipped, by name. JOBS: how many compilers at once (default: cores).
# --short: the grid without its inner cells, most of it read and not compiled; of the builds that are hashed only those that
# differ most; under qemu the tests of the kernels alone.
set -u

short=false compile=-c level=-O2
[ "${1:-}" != --short ] || short=true compile=-fsyntax-only level=-O0

out=build/matrix
model=examples/tiny
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
warnings="-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wvla -Wundef -Wcast-align -Wformat=2 -Werror"
warnings_c="$warnings -Wstrict-prototypes -Wmissing-prototypes"
rm -rf $out
mkdir -p $out/log
passed=0 failed=0 skipped=0

have() { command -v "$1" > /dev/null; }

# Both languages: a compiler without a C++ half is no reason to fail.
can() { # COMPILER LANGUAGE
    echo 'int x;' | "$1" -x "$2" -c -o $out/can.o - 2> /dev/null
}

# start NAME COMMAND: runs in the background, at most $jobs at a time. finish: waits for all.
start() {
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    { bash -c "$2" > "$out/log/$1" 2>&1; echo $? > "$out/log/$1.rc"; } &
}

finish() { wait; }

good() { [ "$(cat "$out/log/$1.rc" 2> /dev/null)" = 0 ]; }

# verdict NAME: counts, prints the cell; the log of a failure comes at the end.
failures=()
verdict() {
    if good "$1"; then
        passed=$((passed + 1))
        printf ' %-13s' ok
    else
        failed=$((failed + 1)) failures+=("$1")
        printf ' %-13s' FAILED
    fi
}

# line NAME TEXT: a check with a line of its own.
line() {
    printf '%-62s' "$2"
    verdict "$1"
    echo
}

skip() {
    skipped=$((skipped + 1))
    printf '%-62s skipped: %s\n' "$1" "$2"
}

language() { case $1 in *++*) echo c++ ;; *) echo c ;; esac; }

compilers=()
for cc in gcc clang; do
    if have $cc; then compilers+=($cc); else skip "$cc" "not installed"; fi
done

# ---- 1. Compiles without a warning ----

switches="default NO_THREADS NO_SIMD NO_AVX512 NO_AMX NO_STDIO STATIC NO_TOKENIZER"
rows=()
for cc in "${compilers[@]}"; do
    for std in c99 c11 c++11 c++17; do
        x=$(language $std)
        if ! can $cc $x; then
            skip "$cc -std=$std" "no $x"
            continue
        fi
        rows+=("$cc $std")
        for switch in $switches; do
            case $short-$switch-$std in true-default-* | true-*-c99 | true-*-c++17 | false-*) ;; *) continue ;; esac
            flags="$compile -O0 -DDSV3_$switch" w=$warnings
            [ $switch = default ] && flags="$compile -O2"
            [ "$switch-$cc-$std" = default-gcc-c99 ] && flags="-c -O2" # some warnings want an optimiser
            [ $x = c ] && w=$warnings_c
            start "$cc-$std-$switch" "$cc -x $x -std=$std $w $flags -I. -o /dev/null tests/compile_minimal.c"
        done
    done
done
finish
echo "The header, warnings as errors:"
printf '%-18s' ""
for switch in $switches; do printf ' %-13s' $switch; done
echo
for row in "${rows[@]}"; do
    set -- $row
    printf '%-18s' "$1 -std=$2"
    for switch in $switches; do
        if [ -e "$out/log/$1-$2-$switch" ]; then verdict "$1-$2-$switch"; else printf ' %-13s' -; fi
    done
    echo
done
echo

# ---- 2. Declarations, two translation units, symbols ----

for cc in "${compilers[@]}"; do
    o=$out/$cc
    start "$cc-declarations" "$cc -std=c99 $warnings_c -I. -c -o /dev/null tests/compile_c99.c"
    start "$cc-programs" "for f in examples/*.c; do $cc -std=c99 $warnings_c $compile -O2 -I. -o /dev/null \$f || exit 1; done"
    start "$cc-two" "$cc -std=c99 -I. -c -o $o-a.o tests/compile_two_a.c && $cc -std=c99 -I. -c -o $o-b.o tests/compile_two_b.c &&
                     $cc -o $o-two $o-a.o $o-b.o -lm -pthread && $o-two"
    if can $cc c++; then
        start "$cc-declarations-cpp" "$cc -x c++ -std=c++11 $warnings -I. -c -o /dev/null tests/compile_cpp.cpp"
        start "$cc-two-cpp" "$cc -std=c99 -I. -c -o $o-ca.o tests/compile_two_a.c &&
                             $cc -x c++ -std=c++17 -I. -c -o $o-cb.o tests/compile_two_b.c &&
                             $cc -o $o-two-cpp $o-ca.o $o-cb.o -lm -pthread && $o-two-cpp"
    fi
    # No public symbol but dsv3_...; nothing that can be written: .data and .bss are empty.
    start "$cc-symbols" "$cc -std=c99 -O2 -fPIC -I. -c -o $o-lib.o tests/compile_two_a.c && nm -g --defined-only $o-lib.o > $o.nm &&
                         grep -q ' dsv3_generate\$' $o.nm && ! grep -v ' dsv3_[a-z0-9_]*\$' $o.nm"
    finish
    start "$cc-data" "size -A -d $o-lib.o | awk '{ print } \$1 ~ /^\\.t?(data|bss)/ && \$1 !~ /^\\.data\\.rel\\.ro/ && \$2 > 0 { bad = 1 } END { exit bad }'"
    start "$cc-fast-math" "! $cc -std=c99 -ffast-math -I. -c -o /dev/null tests/compile_minimal.c 2> $o.fast && grep -q fast-math $o.fast"
    finish
    line "$cc-declarations" "$cc: declarations alone, C99"
    if can $cc c++; then
        line "$cc-declarations-cpp" "$cc: declarations alone, C++11"
        line "$cc-two-cpp" "$cc: implementation in C, host in C++17"
    else
        skip "$cc: C++" "no c++"
    fi
    line "$cc-two" "$cc: two translation units"
    line "$cc-programs" "$cc: the examples, warnings as errors"
    line "$cc-symbols" "$cc: public symbols all begin with dsv3_"
    line "$cc-data" "$cc: no writable static data"
    line "$cc-fast-math" "$cc: -ffast-math is refused"
done
echo

# ---- 3. One hash of logits ----

if have sha256sum; then sum=sha256sum; else sum=cksum; fi
awk 'BEGIN { for (i = 0; i < 120; i++) print (i * 37 + 11) % 4096 }' > $out/ids.txt

# hash NAME COMPILER FLAGS [WRAPPER]: builds the program and hashes its logits, per kernel.
hash() {
    local x=c
    case $3 in *++*) x=c++ ;; esac
    start "hash-$1" "$2 -x $x $3 -I. -o $out/dsv3-$1 examples/dsv3.c -lm -pthread && for isa in scalar auto; do
        for mode in f32 bf16 fp8; do
            ${4:-} $out/dsv3-$1 logits $model --ids $out/ids.txt --out $out/$1.\$isa-\$mode --isa \$isa --compute \$mode --threads 2 || exit 1
        done
        cat $out/$1.\$isa-* | $sum; rm $out/$1.\$isa-*; done | sort -u > $out/$1.sum && test \$(wc -l < $out/$1.sum) = 1 &&
        cat $out/$1.sum; rm -f $out/dsv3-$1; test -s $out/$1.sum && test \$(wc -l < $out/$1.sum) = 1"
}

names=()
for cc in "${compilers[@]}"; do
    for std in c99 gnu11 c++17; do
        can $cc "$(language $std)" || continue
        for optimize in -O0 -O3 "-O3 -march=native"; do
            name="$cc-$std${optimize// /}"
            case $short-$name in
            false-* | true-gcc-c99-O0 | true-gcc-c++17-O3 | true-clang-c99-O3-march=native) names+=("$name") ;;
            *) continue ;;
            esac
            hash "$name" $cc "-std=$std $optimize"
        done
    done
done
for switch in NO_THREADS NO_SIMD NO_AVX512 NO_TOKENIZER; do
    [ $short = false ] || [ $switch = NO_SIMD ] || continue
    names+=("${compilers[0]}-$switch")
    hash "${compilers[0]}-$switch" "${compilers[0]}" "-std=c99 -O2 -DDSV3_$switch"
done
if have aarch64-linux-gnu-gcc && have qemu-aarch64; then
    names+=(aarch64)
    hash aarch64 aarch64-linux-gnu-gcc "-std=c99 -O2 -static" qemu-aarch64
fi
finish
echo "Logits of $model, 120 tokens, scalar and best kernels, hashed:"
first=
for name in "${names[@]}"; do
    value=$(cat "$out/$name.sum" 2> /dev/null)
    if good "hash-$name" && [ -z "$first" ]; then first=$value; fi
    if [ "$value" != "$first" ]; then echo "the hash differs from the first one" >> "$out/log/hash-$name"; echo 1 > "$out/log/hash-$name.rc"; fi
    line "hash-$name" "  $name  $(echo "$value" | head -n 1 | cut -c 1-16)"
done
echo

# ---- 4. aarch64 ----

slow_in_qemu="test_truncate test_modes test_modes_emulated test_sparse" # minutes, or more address space than qemu has; test_kernels and the hash have all modes

if have aarch64-linux-gnu-gcc && have qemu-aarch64; then
    mkdir -p $out/aarch64
    for cc in aarch64-linux-gnu-gcc "clang --target=aarch64-linux-gnu"; do
        have ${cc%% *} || continue
        start "${cc%% *}-aarch64" "for flags in -O2 '-O0 -DDSV3_NO_SIMD' '-O2 -march=armv8.2-a+dotprod'; do
            $cc -std=c99 $warnings_c $compile \$flags -I. -o /dev/null tests/compile_minimal.c || exit 1; done"
    done
    programs=()
    aarch64-linux-gnu-gcc -std=c99 -O1 -I. -c -o $out/aarch64/dsv3.o tests/compile_two_a.c
    for test in tests/test_*.c; do
        name=$(basename "$test" .c)
        case " $slow_in_qemu " in *" $name "*) continue ;; esac
        case $short-$name in true-test_kernels | false-*) ;; *) continue ;; esac
        programs+=("$out/aarch64/$name")
        start "aarch64-$name" "aarch64-linux-gnu-gcc -std=c99 -O1 -static -I. -o $out/aarch64/$name $test $out/aarch64/dsv3.o -lm -pthread"
    done
    finish
    line aarch64-linux-gnu-gcc-aarch64 "aarch64: gcc, warnings as errors: plain, NO_SIMD, with dotprod"
    if have clang; then line clang-aarch64 "aarch64: clang, warnings as errors: plain, NO_SIMD, with dotprod"; fi
    for name in $slow_in_qemu; do skip "aarch64: $name" "too slow under qemu"; done
    # qemu's own CPU has all extensions; a Cortex-A72 lacks dot products of bytes, and has other kernels for these.
    for cpu in max cortex-a72; do
        [ $cpu = max ] || programs=("$out/aarch64/test_kernels")
        echo "aarch64, $cpu: the tests, under qemu (without the data beside the repository: twenty times slower here):"
        sh tests/run.sh -w "qemu-aarch64 -cpu $cpu" "${programs[@]}" | tee $out/log/aarch64-run
        counts=$(tail -n 1 $out/log/aarch64-run)
        passed=$((passed + $(echo "$counts" | awk '{ print $1 + 0 }')))
        failed=$((failed + $(echo "$counts" | awk '{ print $3 + 0 }')))
        skipped=$((skipped + $(echo "$counts" | awk '{ print $5 + 0 }')))
    done
else
    skip "aarch64" "wants aarch64-linux-gnu-gcc and qemu-aarch64"
fi
echo

# ---- 5. Windows ----

if have x86_64-w64-mingw32-gcc; then
    start mingw-c "x86_64-w64-mingw32-gcc -std=c99 $warnings_c -O2 -I. -c -o /dev/null tests/compile_minimal.c"
    start mingw-program "x86_64-w64-mingw32-gcc -std=c99 $level -I. -o $out/dsv3.exe examples/dsv3.c -lm -pthread"
    start mingw-dll "x86_64-w64-mingw32-gcc -std=c99 $level -DDSV3_DLL -shared -I. -o $out/dsv3.dll tests/compile_two_a.c -lm -pthread"
    finish
    line mingw-c "mingw: the header, warnings as errors"
    line mingw-program "mingw: the program links"
    line mingw-dll "mingw: a DLL links"
else
    skip "Windows" "wants x86_64-w64-mingw32-gcc"
fi
echo

# ---- 6. The shared library, from Python ----

if [ -e build/libdsv3.so ]; then
    start lib-symbols "nm -D --defined-only build/libdsv3.so | tee /dev/stderr | grep -q ' T dsv3_generate\$' &&
                       ! nm -D --defined-only build/libdsv3.so | grep -v ' dsv3_'"
    finish
    line lib-symbols "libdsv3.so: shows dsv3_... and nothing else"
    if have python3; then
        start ffi-layout "python3 -B examples/ffi.py --asserts > $out/layout.c && ${compilers[0]} -std=c11 -I. -fsyntax-only $out/layout.c"
        start ffi-run "python3 -B examples/ffi.py build/libdsv3.so $model"
        finish
        line ffi-layout "ffi.py: its structs are laid out as the compiler does"
        line ffi-run "ffi.py: generates with libdsv3.so"
    else
        skip "ffi.py" "wants python3"
    fi
fi

for name in "${failures[@]}"; do
    printf '\n---- %s\n' "$name"
    tail -n 25 "$out/log/$name"
done
echo
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
