#!/bin/sh
# Runs test programs one after another and adds up what they say.
#   tests/run.sh [-s FOLDER] [-w WRAPPER] PROGRAM...
# FOLDER: data beside the repository, handed to each program if it is there. WRAPPER: a command to run them with.
# A program's last line is "N passed, M failed, K skipped"; one that ends in another way counts as a failure.

folder= wrapper=
while getopts s:w: option; do
    case $option in
    s) folder=$OPTARG ;;
    w) wrapper=$OPTARG ;;
    *) echo "usage: tests/run.sh [-s FOLDER] [-w WRAPPER] PROGRAM..." >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
[ -d "$folder" ] || folder=

log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
trap 'exit 130' INT TERM
passed=0 failed=0 skipped=0
for program in "$@"; do
    start=$(date +%s)
    case $program in
    *.sh) sh "$program" ${folder:+"$folder"} > "$log" 2>&1 ;;
    *) $wrapper "$program" ${folder:+"$folder"} > "$log" 2>&1 ;;
    esac
    status=$?
    took=$(($(date +%s) - start))
    counts=$(tail -n 1 "$log" | sed -n 's/^\([0-9][0-9]*\) passed, \([0-9][0-9]*\) failed, \([0-9][0-9]*\) skipped$/\1 \2 \3/p')
    if [ -n "$counts" ]; then
        sed '$d' "$log"
    else
        cat "$log"
        echo "$program: ended with status $status and without its last line"
        counts="0 1 0"
    fi
    p=${counts%% *} k=${counts##* } f=${counts#* }
    f=${f% *}
    if [ $status -ne 0 ] && [ "$f" -eq 0 ]; then
        echo "$program: ended with status $status"
        f=1
    fi
    printf '%-28s %s passed, %s failed, %s skipped  %s s\n' "${program##*/}" "$p" "$f" "$k" "$took"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + k))
done
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
