#!/bin/sh
# gcc against clang on the kernel bench, in turn: the median of each over the rounds, and their ratio. What lies more than 15 %
# apart is marked. For a quiet machine; not a test. Called by `make bench-compilers`.
# Usage: compilers.sh GCC-BENCH CLANG-BENCH ROUNDS [options of the bench]

gcc=$1 clang=$2 rounds=$3
shift 3
work=build/compilers
mkdir -p $work
rm -f $work/gcc.jsonl $work/clang.jsonl
i=0
while [ $i -lt "$rounds" ]; do
    $gcc --what kernels --json --reps 1 "$@" >> $work/gcc.jsonl || exit 1
    $clang --what kernels --json --reps 1 "$@" >> $work/clang.jsonl || exit 1
    i=$((i + 1))
done
awk '
    function text(key) { return match($0, "\"" key "\":\"[^\"]*\"") ? substr($0, RSTART + length(key) + 4, RLENGTH - length(key) - 5) : "?" }
    function number(key) { return match($0, "\"" key "\":[-0-9.e+]*") ? substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3) + 0 : 0 }
    function median(list,    v, n, a, b, x) {
        n = split(list, v, " ")
        for (a = 2; a <= n; a++) for (b = a; b > 1 && v[b] + 0 < v[b - 1] + 0; b--) { x = v[b]; v[b] = v[b - 1]; v[b - 1] = x }
        return n % 2 ? v[(n + 1) / 2] : (v[n / 2] + v[n / 2 + 1]) / 2
    }
    {
        key = sprintf("%-6s %-7s %-8s %-12s %3d %5d", text("dtype"), text("compute"), text("isa"), text("shape"), number("threads"), number("rows"))
        if (!(key in seen)) { seen[key] = 1; order[n++] = key }
        speed = number("gmac_s") / (number("cpu") > 0 ? number("cpu") : 1) # what others took of the cores is left out
        list[FILENAME ~ /clang/, key] = list[FILENAME ~ /clang/, key] " " speed
    }
    END {
        printf "%-6s %-7s %-8s %-12s %3s %5s %9s %9s %9s\n", "dtype", "compute", "isa", "weights", "thr", "rows", "gcc", "clang", "gcc/clang"
        for (i = 0; i < n; i++) {
            a = median(list[0, order[i]]); b = median(list[1, order[i]])
            apart = b > 0 ? a / b : 0
            far = apart < 0.85 || apart > 1 / 0.85
            marked += far
            printf "%s %9.1f %9.1f %9.2f%s\n", order[i], a, b, apart, far ? "  APART" : ""
        }
        printf "\nGMAC in a second of each core, medians; %d of %d more than 15 %% apart\n", marked, n
    }' $work/gcc.jsonl $work/clang.jsonl
