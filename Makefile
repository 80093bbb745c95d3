# dsv3.h is one header; this builds its program, examples and tests. `make help` lists what there is.
# Honours CC CFLAGS LDFLAGS PREFIX DESTDIR. Needs GNU make and a C compiler; everything goes to build/.

CC      ?= cc
CFLAGS  ?= -O2
PREFIX  ?= /usr/local
PYTHON  ?= python3
# Data that lies beside the repository: tests that want it are skipped where it is not.
SHARED  ?= ../shared

STD      := -std=c99
WARNINGS := -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes -Wvla -Wundef \
            -Wcast-align -Wformat=2
LDLIBS   := -lm -pthread
COMPILE   = $(CC) $(STD) $(WARNINGS) -I. $(CFLAGS)

HEADERS  := dsv3.h $(wildcard examples/*.h tests/*.h bench/*.h)
EXAMPLES := $(patsubst examples/%.c,build/%,$(wildcard examples/*.c))
TESTS    := $(sort $(wildcard tests/test_*.c))
FUZZERS  := $(patsubst tests/%.c,build/fuzz/%,$(wildcard tests/fuzz_*.c))
# Those that run threads of their own.
TSAN_TESTS := $(filter $(addprefix tests/test_,threads.c session.c api.c matmul.c),$(TESTS))

SANITIZE := -O2 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN     := -O2 -g -fsanitize=thread
FUZZ_SECONDS ?= 60

.PHONY: all test run oracle bench bench-compilers tile-check lib sanitize tsan fuzz analyze matrix lint format install uninstall clean help
.DEFAULT_GOAL := all

all: $(EXAMPLES) ## the program build/dsv3 and the other examples

build/%: examples/%.c $(HEADERS)
	@mkdir -p $(@D)
	$(COMPILE) -o $@ $< $(LDFLAGS) $(LDLIBS)

run: build/dsv3 ## builds the program and lets the small model in examples/tiny tell a tale
	@{ printf 'Once upon a time there was a'; build/dsv3 generate examples/tiny 'Once upon a time there was a' -n 200 --seed 11; } | fold -s -w 100

# Tests that look inside have the implementation in them; those of the public calls alone take it from the library.
build/test/%: tests/%.c build/libdsv3.a $(HEADERS)
	@mkdir -p $(@D)
	$(COMPILE) -o $@ $< build/libdsv3.a $(LDFLAGS) $(LDLIBS)

test: build/dsv3 $(TESTS:tests/%.c=build/test/%) ## all tests: no Python, no network
	@DSV3=build/dsv3 sh tests/run.sh -s "$(SHARED)" $(TESTS:tests/%.c=build/test/%) tests/cli.sh

build/venv/.done: tests/oracle/requirements.txt
	$(PYTHON) -m venv build/venv
	build/venv/bin/pip install -q -r $<
	@touch $@

oracle: build/dsv3 build/libdsv3.so build/bench build/venv/.done ## compares with the transformers library, in a venv of its own (1 GB)
	build/venv/bin/python tests/oracle/run.py --dsv3 build/dsv3 --work build/oracle --shared "$(SHARED)"

build/bench: bench/bench.c $(HEADERS)
	@mkdir -p $(@D)
	$(COMPILE) -DBENCH_CFLAGS='"$(CFLAGS)"' -o $@ $< $(LDFLAGS) $(LDLIBS)

build/sparse: bench/sparse.c $(HEADERS)
	@mkdir -p $(@D)
	$(COMPILE) -o $@ $< $(LDFLAGS) $(LDLIBS)

# About five minutes on two cores. --then: another group of measurements in the same run.
BENCH ?= --threads 1,2 --reps 3 --what bandwidth,open,decode,prompt --context 8 --prompt 512 \
         --then --threads 2 --what decode,prompt,rows --context 8,4096 --prompt 128,4096 --rows 1-8,12,16,24,32,48,64 \
         --then --what kernels

bench: build/bench ## speed beside the bound, into bench/RESULTS.md and bench/speed.svg (writes 4.4 GB to build/; BENCH='...' for options)
	build/bench --commit "$$(git describe --always --dirty 2> /dev/null)" --svg build/speed.svg $(BENCH) > build/RESULTS.md
	@mv build/RESULTS.md bench/RESULTS.md
	@mv build/speed.svg bench/speed.svg
	@cat bench/RESULTS.md

build/bench-gcc build/bench-clang: build/bench-%: bench/bench.c $(HEADERS)
	@mkdir -p $(@D)
	$* $(STD) $(WARNINGS) -I. $(CFLAGS) -DBENCH_CFLAGS='"$(CFLAGS)"' -o $@ $< $(LDFLAGS) $(LDLIBS)

ROUNDS ?= 5

bench-compilers: build/bench-gcc build/bench-clang ## gcc against clang on the kernels, in turn (ROUNDS=5; COMPILERS='...' for options)
	@sh bench/compilers.sh build/bench-gcc build/bench-clang $(ROUNDS) --threads 1 $(COMPILERS)

tile-check: ## the tile loops keep their sums in registers, with gcc and clang
	@sh tests/tile.sh

# One line of C each: the header is the library.
build/lib/dsv3.c:
	@mkdir -p $(@D)
	@printf '#define DSV3_DLL\n#define DSV3_IMPLEMENTATION\n#include "dsv3.h"\n' > $@

build/lib/dsv3.o: build/lib/dsv3.c dsv3.h
	$(COMPILE) -fPIC -fvisibility=hidden -c -o $@ $<

build/libdsv3.so: build/lib/dsv3.o
	$(CC) -shared -o $@ $< $(LDFLAGS) $(LDLIBS)

build/libdsv3.a: build/lib/dsv3.o
	$(AR) rcs $@ $<

lib: build/libdsv3.so build/libdsv3.a ## a shared and a static library, for other languages (examples/ffi.py)

# instrumented NAME,FLAGS: how build/NAME/ has tests, and the library that some of them link, under a sanitizer.
define instrumented
build/$(1)/dsv3.o: build/lib/dsv3.c dsv3.h
	@mkdir -p $$(@D)
	$$(CC) $$(STD) -I. $(2) -c -o $$@ $$<

build/$(1)/libdsv3.a: build/$(1)/dsv3.o
	$$(AR) rcs $$@ $$<

build/$(1)/%: tests/%.c build/$(1)/libdsv3.a $$(HEADERS)
	@mkdir -p $$(@D)
	$$(CC) $$(STD) -I. $(2) -o $$@ $$< build/$(1)/libdsv3.a $$(LDFLAGS) $$(LDLIBS)
endef
$(eval $(call instrumented,sanitize,$(SANITIZE)))
$(eval $(call instrumented,tsan,$(TSAN)))

build/sanitize/dsv3: examples/dsv3.c $(HEADERS)
	@mkdir -p $(@D)
	$(CC) $(STD) -I. $(SANITIZE) -o $@ $< $(LDFLAGS) $(LDLIBS)

# Without the modes over emulated intrinsics: minutes, and their kernels are in test_kernels_emulated.
SANITIZED := $(filter-out build/sanitize/test_modes_emulated,$(TESTS:tests/%.c=build/sanitize/%))

sanitize: build/sanitize/dsv3 $(SANITIZED) ## all tests under ASan and UBSan
	@DSV3=build/sanitize/dsv3 sh tests/run.sh -s "$(SHARED)" $(SANITIZED) tests/cli.sh

tsan: $(TSAN_TESTS:tests/%.c=build/tsan/%) ## the tests with threads under TSan
	@sh tests/run.sh -s "$(SHARED)" $(TSAN_TESTS:tests/%.c=build/tsan/%)

# Comparisons are not traced where inputs are texts: with the sanitizers' own they were half of the time.
build/fuzz/fuzz_chat build/fuzz/fuzz_reply build/fuzz/fuzz_schema build/fuzz/fuzz_tools: FUZZ_FLAGS := -fno-sanitize-coverage=trace-cmp

build/fuzz/%: tests/%.c $(HEADERS)
	@mkdir -p $(@D)
	clang $(STD) -I. -O2 -g -fsanitize=fuzzer,address,undefined $(FUZZ_FLAGS) -DDSV3_FUZZER -o $@ $< $(LDLIBS)

fuzz: $(FUZZERS) ## each fuzzer for FUZZ_SECONDS (60), from the seeds in tests/fuzz/
	@for f in $(FUZZERS); do n=$${f##*/fuzz_}; mkdir -p build/fuzz/corpus/$$n; \
	    $$f -artifact_prefix=build/fuzz/ -max_total_time=$(FUZZ_SECONDS) $$(ls tests/fuzz/$$n.dict 2>/dev/null | sed 's/^/-dict=/') build/fuzz/corpus/$$n \
	        $$(ls -d tests/fuzz/$$n 2>/dev/null) || exit 1; done

analyze: build/lib/dsv3.c ## gcc -fanalyzer, clang --analyze and cppcheck, those that are there
	@if command -v gcc > /dev/null; then echo gcc -fanalyzer; gcc $(STD) -I. -O1 -fanalyzer -c -o /dev/null build/lib/dsv3.c; fi
	@if command -v clang > /dev/null; then echo clang --analyze; \
	    clang $(STD) -I. --analyze --analyzer-output text -o /dev/null build/lib/dsv3.c; fi
	@if command -v cppcheck > /dev/null; then echo cppcheck; \
	    cppcheck -q --std=c99 --enable=warning,portability --inline-suppr -I. build/lib/dsv3.c; fi

matrix: build/dsv3 lib ## compilers, standards, switches, aarch64 and Windows; one hash of logits for all
	@bash tests/matrix.sh

lint: lib tile-check ## names, banners, symbols, versions, tile loops
	@sh tests/lint.sh

format: ## clang-format over examples, tests and bench
	clang-format -i $(wildcard examples/*.[ch] tests/*.[ch] bench/*.[ch])

install: build/dsv3 ## the header and the program, under PREFIX (/usr/local)
	install -d "$(DESTDIR)$(PREFIX)/include" "$(DESTDIR)$(PREFIX)/bin"
	install -m 644 dsv3.h "$(DESTDIR)$(PREFIX)/include/dsv3.h"
	install -m 755 build/dsv3 "$(DESTDIR)$(PREFIX)/bin/dsv3"

uninstall: ## takes them away again
	rm -f "$(DESTDIR)$(PREFIX)/include/dsv3.h" "$(DESTDIR)$(PREFIX)/bin/dsv3"

clean: ## removes build/
	rm -rf build

build/variants: bench/variants.c dsv3.h
	@mkdir -p $(@D)
	@$(COMPILE) -O0 -o $@ $< $(LDFLAGS) $(LDLIBS)

help: build/variants ## this list, and which inner loops each instruction set has of its own, or borrows
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' Makefile | awk -F '\t' '{ printf "  %-15s %s\n", $$1, $$2 }'
	@echo; build/variants
