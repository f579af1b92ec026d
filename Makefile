# SPDX-License-Identifier: GPL-2.0-only
# Direct reads of compressed EROFS files. `make help` tells what can be made.

export BASE KSRC IMAGE DATA CACHE JOBS SAN SOAK READS SEED ONLY REPLAY FULL PAGES ROUNDS

# another python first in PATH would not see Debian's modules
PYTHON := /usr/bin/python3 -B

.PHONY: help run check bench series lint clean
help:
	@echo 'make run      read compressed images direct and buffered on a kernel with the series: one table'
	@echo 'make check    KUnit suite and selftests in the same kernel: what passed, what failed'
	@echo 'make bench    what direct reads cost and gain: instructions on arm64, throughput, latency; a report in out/'
	@echo 'make series   the mails of the series in out/series/BASE; each commit built and checked'
	@echo 'make lint     shellcheck, pyflakes, pycodestyle, clang-format, checkpatch, kernel-doc, sparse'
	@echo 'make clean    remove out/ (the cache stays: remove its directory by hand)'
	@echo
	@echo 'BASE=7.3      kernel to use, 7.3 (default) or 6.12, from a Debian linux-source package'
	@echo 'KSRC=DIR      your own kernel tree or git checkout instead; only read, never changed'
	@echo 'IMAGE=FILE    make run: your own EROFS image'
	@echo 'DATA=DIR      make run: images made of your own directory'
	@echo 'ONLY=GLOB     make check: only the guests of this name (lz4*, qemu.*)'
	@echo '              make bench: only this part (count: instructions, qemu.lz4-4k)'
	@echo 'SAN=1         make check: on kernels with KASAN, UBSAN, lockdep and kmemleak'
	@echo 'PAGES=16K     make check: all images on arm64 with such pages (emulated), instead'
	@echo 'SOAK=N        make check: N seconds of random reads of each image, instead of READS'
	@echo 'READS=N       make check: random reads of each image, about (default: 5000)'
	@echo 'FULL=1        make bench: all cells, which takes hours'
	@echo 'ROUNDS=N      make bench: measure each cell N times (default: 3)'
	@echo 'SEED=N        make check: seed of what is random (default: 1)'
	@echo 'REPLAY=CALL   make check: only this call, as a failed test printed it'
	@echo 'CACHE=DIR     where downloads and builds are kept (default: ~/.cache/erofs-dio)'
	@echo 'JOBS=N        parallel jobs of a build (default: the number of processors)'

run check bench series lint:
	@$(PYTHON) scripts/$@.py

clean:
	rm -rf out
