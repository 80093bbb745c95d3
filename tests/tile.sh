#!/bin/sh
# The innermost loops of the tile functions, for floats, words and bytes, keep their sums in registers: counts the vector
# loads and stores relative to the stack pointer inside the loops that multiply, in what gcc and clang make of them at -O2
# and -O3. Called by `make tile-check`.
# Usage: tile.sh [-v] [most allowed in a loop, default 0]

verbose=
[ "$1" = -v ] && verbose=1 && shift
most=${1:-0}
work=build/tile
mkdir -p $work
printf '#define DSV3_IMPLEMENTATION\n#include "dsv3.h"\n' > $work/dsv3.c
tried=0 failed=0

command -v objdump > /dev/null || { echo "skip   objdump is not there"; exit 0; }
for cc in gcc clang; do
    command -v $cc > /dev/null || { echo "skip   $cc is not there"; continue; }
    for flags in -O2 -O3; do
        $cc -std=c99 -I. $flags -c -o $work/$cc.o $work/dsv3.c || exit 1
        objdump -d --no-show-raw-insn $work/$cc.o > $work/$cc.s
        # A loop is a jump back; innermost, if no other loop that multiplies lies inside. Addresses are hexadecimal.
        awk -v most="$most" -v verbose="$verbose" -v cc="$cc $flags" '
            function hex(s,    i, v) {
                v = 0
                for (i = 1; i <= length(s); i++) v = v * 16 + index("0123456789abcdef", substr(s, i, 1)) - 1
                return v
            }
            function finish(    i, j, inner, stack, macs, k, busy) {
                if (name == "") return
                functions++
                for (i = 0; i < n_loops; i++) {
                    busy[i] = 0
                    for (k = 0; k < n; k++) if (at[k] >= from[i] && at[k] <= to[i]) busy[i] += mac[k]
                }
                for (i = 0; i < n_loops; i++) {
                    inner = 1
                    for (j = 0; j < n_loops; j++)
                        if (j != i && busy[j] && from[j] >= from[i] && to[j] <= to[i] && (from[j] > from[i] || to[j] < to[i]))
                            inner = 0
                    if (!inner) continue
                    stack = macs = 0
                    for (k = 0; k < n; k++) if (at[k] >= from[i] && at[k] <= to[i]) { stack += on_stack[k]; macs += mac[k] }
                    if (!macs) continue
                    loops++; all += macs
                    if (verbose || stack > most)
                        printf "%s %s: %s, loop at %x: %d multiply-adds, %d vector moves on the stack\n",
                            (stack > most ? "FAILED" : "      "), cc, name, from[i], macs, stack
                    if (stack > most) bad++
                }
            }
            /^[0-9a-f]+ <.*>:$/ {
                finish()
                name = $2; gsub(/[<>:]/, "", name)
                if (name !~ /^dsv3__k_(tile|bytes_tile)/) name = ""
                n = n_loops = framed = 0
                next
            }
            name != "" && /^ *[0-9a-f]+:/ {
                address = $1; sub(/:/, "", address)
                at[n] = hex(address)
                if (/mov +%rsp,%rbp/) framed = 1 # else %rbp is a register like any other
                on_stack[n] = /%[xyz]mm/ && (/\(%rsp/ || (framed && /\(%rbp/))
                sub(/{vex} /, "")
                mac[n] = $2 ~ /^(vfmadd|vfnmadd|vpdpbusd|vpdpwssd|vdpbf16ps|vpmaddubsw|vpmaddwd|mulps|mulss)/
                if ($2 ~ /^j/ && $3 ~ /^[0-9a-f]+$/ && hex($3) <= at[n]) { from[n_loops] = hex($3); to[n_loops++] = at[n] }
                n++
            }
            END {
                finish()
                if (!functions || !loops) { print "FAILED " cc ": no tile function with a loop that multiplies"; exit 1 }
                printf "%s %s: %d functions, %d innermost loops, %d multiply-adds in them\n", (bad ? "FAILED" : "ok    "), cc,
                    functions, loops, all
                exit bad > 0
            }' $work/$cc.s || failed=1
        tried=$((tried + 1))
    done
done
[ $tried -gt 0 ] || echo "skip   neither gcc nor clang is there"
exit $failed
