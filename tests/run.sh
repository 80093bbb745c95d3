#!/bin/sh
# Runs test programs, as many at once as there are cores, and adds up what they say.
#   tests/run.sh [-s FOLDER] [-w WRAPPER] [-j JOBS] PROGRAM...
# FOLDER: data beside the repository, handed to each program if it is there. WRAPPER: a command to run them with.
# A program's last line is "N passed, M failed, K skipped"; one that ends in another way counts as a failure.

folder= wrapper= jobs=$(getconf _NPROCESSORS_ONLN)
while getopts s:w:j: option; do
    case $option in
    s) folder=$OPTARG ;;
    w) wrapper=$OPTARG ;;
    j) jobs=$OPTARG ;;
    *) echo "usage: tests/run.sh [-s FOLDER] [-w WRAPPER] [-j JOBS] PROGRAM..." >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ -d "$folder" ] || folder=

results=$(mktemp -d) || exit 1
trap 'rm -rf "$results"' EXIT
trap 'exit 130' INT TERM
export folder wrapper results

# Runs $1; says all of it at once, in one write, since another's words may come between.
one='
    name=${1##*/} log=$results/$name start=$(date +%s) command=$wrapper
    case $name in *.sh) command=sh ;; esac
    $command "$1" ${folder:+"$folder"} > "$log" 2>&1
    status=$?
    counts=$(tail -n 1 "$log" | sed -n "s/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed, \([0-9][0-9]*\) skipped\$/\1 \2 \3/p")
    if [ -n "$counts" ]; then
        sed "\$d" "$log" > "$log.said"
    else
        cp "$log" "$log.said"
        echo "$1: ended with status $status and without its last line" >> "$log.said"
        counts="0 1 0"
    fi
    p=${counts%% *} k=${counts##* } f=${counts#* }
    f=${f% *}
    if [ $status -ne 0 ] && [ "$f" -eq 0 ]; then
        echo "$1: ended with status $status" >> "$log.said"
        f=1
    fi
    printf "%-28s %s passed, %s failed, %s skipped  %s s\n" "$name" "$p" "$f" "$k" $(($(date +%s) - start)) >> "$log.said"
    echo "$p $f $k" > "$log.counts"
    cat "$log.said"'
printf '%s\n' "$@" | xargs -P "$jobs" -I PROGRAM sh -c "$one" one PROGRAM

for program in "$@"; do
    cat "$results/${program##*/}.counts" || echo "0 1 0" # one that could not be run
done | awk '{ p += $1; f += $2; k += $3 }
    END { printf "%d passed, %d failed, %d skipped\n", p, f, k; exit f || !p }'
