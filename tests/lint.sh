#!/bin/sh
# What a compiler does not see: names, banners, symbols, versions. Called by `make lint`, from the top of the repository.

header=dsv3.h
work=build/lint
mkdir -p $work
passed=0 failed=0 skipped=0

# report NAME: reads what is wrong from stdin; nothing is good.
report() {
    if [ -s "$1" ] || ! [ -e "$1" ]; then
        failed=$((failed + 1))
        echo "FAILED $2"
        sed 's/^/    /' "$1" | head -n 20
    else
        passed=$((passed + 1))
        echo "ok     $2"
    fi
}

skip() {
    skipped=$((skipped + 1))
    echo "skip   $1"
}

# The header without comments and strings, lines kept.
awk '
{
    out = ""; line = $0
    while (length(line)) {
        if (block) {
            i = index(line, "*/")
            if (!i) break
            block = 0; line = substr(line, i + 2)
            continue
        }
        c = substr(line, 1, 1); two = substr(line, 1, 2)
        if (two == "/*") { block = 1; line = substr(line, 3); continue }
        if (two == "//") break
        if (c == "\"" || c == "\047") {
            n = 2
            while (n <= length(line) && substr(line, n, 1) != c) n += substr(line, n, 1) == "\\" ? 2 : 1
            out = out c c; line = substr(line, n + 1)
            continue
        }
        out = out c; line = substr(line, 2)
    }
    print out
}' $header > $work/code

# The block of the manual under a heading, to the next heading (capitals at the start of a line).
manual() {
    awk -v heading="$1" '
        /^ *\*\// && !seen_end { seen_end = 1; if (inside) exit }
        $0 ~ "^ *" heading "( |$|:|,)" { inside = 1; next }
        inside && /^ ? ? ?[A-Z][A-Z ,\/]+( |$|:)/ && !/^ *[A-Z]+_/ { exit }
        inside { print }' $header
}

# ---- Text ----

grep -nE '[ 	]+$' $header Makefile examples/*.[ch] examples/*.py tests/*.[ch] tests/*.sh bench/*.sh bench/*.[ch] > $work/space 2> /dev/null
report $work/space "no space at the end of a line"
grep -n "$(printf '\t')" $header examples/*.[ch] tests/*.[ch] > $work/tabs
report $work/tabs "no tabs in C"
grep -nE 'TODO|FIXME|XXX' $header examples/*.[ch] > $work/todo
report $work/todo "nothing left to do in the sources"
awk '{ gsub(/[\200-\277]/, "") } length > 124 { print FILENAME ":" FNR ": " length " columns" }' $header examples/*.[ch] > $work/long
report $work/long "lines fit"

# ---- Banners and contents ----

grep -n '^// >>' $header | sed 's/^[0-9]*:\/\/ >>\([a-z0-9]*\).*/\1/' > $work/banners
sort $work/banners | uniq -d | sed 's/^/twice: /' > $work/twice
report $work/twice "each banner's key stands once"
# Two columns, read one after the other: "key   text", the keys apart from everything by two spaces or more.
manual CONTENTS | awk '
    NF { left[++l] = $1; rest = substr($0, 15) }
    NF && match(rest, /   +[a-z0-9]+  +/) { split(substr(rest, RSTART), word, " "); right[++r] = word[1] }
    END { for (i = 1; i <= l; i++) print left[i]; for (i = 1; i <= r; i++) print right[i] }' > $work/contents
if [ -s $work/contents ]; then
    diff $work/contents $work/banners > $work/contents-diff
else
    echo "no CONTENTS in the manual" > $work/contents-diff
fi
report $work/contents-diff "CONTENTS lists the banners, in order"

# ---- Names ----

# A function of a section carries its key, or one of the few other words that belong there; base and err serve all and
# are free.
awk '
    BEGIN {
        also["cpu"] = "fp"; also["thr"] = "atomic|pool"; also["num"] = "fp8|e4m3|e8m0|bf16|f16|f32|i8"
        also["kern"] = "k|exp|sigmoid|silu"; also["mm"] = "ten"; also["json"] = "utf8"; also["st"] = "blob"
        also["nn"] = "work|carve"; also["chat"] = "reply"; also["ses"] = "gen"
    }
    FNR == NR { if (match($0, /^\/\/ >>[a-z0-9]+/)) key_at[FNR] = substr($0, 6, RLENGTH - 5); next }
    FNR in key_at { key = key_at[FNR] }
    key == "" || key == "base" || key == "err" { next }
    /^[A-Za-z].*[ *(]dsv3__[a-z0-9_]+(\(|$)/ && !/^#/ && !/;$/ {
        match($0, /dsv3__[a-z0-9_]+\(/)
        if (RSTART == 0) next
        name = substr($0, RSTART + 6, RLENGTH - 7)
        prefix = key in also ? "(" key "|" also[key] ")" : key
        if (name !~ "^" prefix "(_|$)") print "dsv3.h:" FNR ": dsv3__" name " in >>" key
    }' $header $work/code > $work/prefixes
report $work/prefixes "private functions carry the key of their section"

awk '/^static [^=]*\([^{]*\);$/ { print FNR ": " $0 }' $work/code > $work/prototypes
report $work/prototypes "no static prototypes: what is used stands above"

grep -nwE 'printf|fprintf|sprintf|snprintf|puts|abort|exit|_exit|getenv|errno|signal|setlocale|strtod|rand|srand|system' $work/code > $work/calls
report $work/calls "no printf, abort, exit, getenv, errno in the library"

# ---- Options, versions, data path ----

manual OPTIONS | grep -oE 'DSV3_[A-Z0-9_]+' | sort -u > $work/options
: > $work/options-missing
[ -s $work/options ] || echo "no OPTIONS in the manual" >> $work/options-missing
while read -r macro; do
    case $macro in *_) continue ;; esac # "DSV3_NO_..."
    grep -qw "$macro" $work/code || echo "$macro is not in the code" >> $work/options-missing
done < $work/options
grep -oE '(ifdef|ifndef|defined\() *DSV3_[A-Z0-9_]+' $work/code | grep -oE 'DSV3_[A-Z0-9_]+' | grep -vE '^DSV3__|^DSV3_(H|API|IMPLEMENTATION)$' |
    sort -u | while read -r macro; do
        grep -qx "$macro" $work/options || echo "$macro is not in OPTIONS" >> $work/options-missing
    done
report $work/options-missing "every macro in OPTIONS exists, and the other way round"

number() { sed -n "s/^#define DSV3_VERSION_$1 *//p" $header; }
version="$(number MAJOR).$(number MINOR).$(number PATCH)"
: > $work/version
grep -qEx "#define DSV3_VERSION_STRING +\"$version\"" $header || echo "DSV3_VERSION_STRING is not \"$version\"" >> $work/version
history=$(sed -n '/REVISION HISTORY/,$p' $header | grep -oE '[0-9]+\.[0-9]+\.[0-9]+' | head -n 1)
[ "$history" = "$version" ] || echo "REVISION HISTORY begins with '$history', the macros say $version" >> $work/version
report $work/version "version numbers, string and history agree"

sed -n '/DATA PATH/,/\*\//p' $header | grep -oE 'dsv3_[a-z0-9_]+' | sort -u > $work/path
: > $work/path-missing
[ -s $work/path ] || echo "no DATA PATH" > $work/path-missing
while read -r name; do
    grep -qE "^[A-Za-z].*[ *]$name\(" $work/code || echo "$name is no function" >> $work/path-missing
done < $work/path
report $work/path-missing "the functions of DATA PATH exist"

# ---- The built library ----

if [ -e build/libdsv3.so ] && command -v nm > /dev/null; then
    nm -D --defined-only build/libdsv3.so | awk '$NF !~ /^dsv3_[a-z0-9]/ { print }' > $work/symbols
    report $work/symbols "the library shows dsv3_... and nothing else"
    grep -E '^DSV3_API|^ *DSV3_API' $work/code | grep -oE 'dsv3_[a-z0-9_]+\(' | tr -d '(' | sort -u > $work/declared
    nm -D --defined-only build/libdsv3.so | awk '{ print $NF }' | sort -u > $work/shown
    diff $work/declared $work/shown > $work/symbols-diff
    report $work/symbols-diff "every declared function is in the library"
else
    skip "symbols: wants build/libdsv3.so and nm"
fi
for script in tests/*.sh bench/*.sh; do
    case $(head -n 1 "$script") in *bash*) bash -n "$script" ;; *) sh -n "$script" ;; esac
done > $work/scripts 2>&1
report $work/scripts "the scripts parse"

echo
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
