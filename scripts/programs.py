#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""The programs that run in the guest."""
from pathlib import Path

import apt
from kernel import ARCHES, Arch, Kernel
from ui import JOBS, REPO, Failure, digest, entry, run, step

SOURCE = REPO / "tools/testing/selftests/erofs"
NAMES = ("dio_callers", "dio_devices", "dio_exercise", "dio_read", "dio_speed", "erofs_forge",
         "erofs_oracle")
# libraries that are nothing but headers, the same for all architectures
HEADERS = ("CLI", "nlohmann")
LIBRARIES = ("libaio-dev", "liblz4-dev", "liblzma-dev", "liburing-dev", "libxxhash-dev",
             "libzstd-dev", "zlib1g-dev")


def built(names: tuple[str, ...] = NAMES, *variables: str, gcc: str = "g++",
          parts: tuple[Path, ...] = ()) -> Path:
    """Directory with the programs; variables are their Makefile's, parts files that these name."""
    apt.ensure()
    # read once: what is built is what the key says
    content = {path.name: path.read_bytes()
               for path in (SOURCE / "Makefile", *sorted(SOURCE.glob("*.[ch]pp")), *parts)}

    def make(work: Path) -> None:
        for name, data in content.items():
            (work / name).write_bytes(data)
        with step(f"building {', '.join(names)}"):
            run(["make", f"-j{JOBS}", *names, *variables], what="test programs", cwd=work)

    key = digest(apt.linked(gcc), *names, *variables, *content, *content.values())
    return entry("programs", key, make)


def cross(arch: Arch) -> list[str]:
    """Variables of the Makefile to build for a machine that may be another one."""
    if not arch.cross:
        return []
    root = apt.foreign(arch.name, *LIBRARIES) / "usr"

    def headers(work: Path) -> None:
        for name in HEADERS:
            (work / name).symlink_to(Path("/usr/include", name))

    more = entry("headers", digest(*HEADERS), headers)
    return [f"CXX={arch.cross}g++", f"CXXFLAGS=-O2 -isystem {root}/include -isystem {more}",
            f"LDFLAGS=-L{root}/lib/{arch.cross.rstrip('-')}"]


def programs(vehicle: str = "uml") -> list[Path]:
    arch = ARCHES[vehicle]
    made = built(NAMES, *cross(arch), gcc=f"{arch.cross}g++")
    return [made / name for name in NAMES]


def oracle() -> Path:
    return built() / "erofs_oracle"


def bench(linux: Kernel) -> Path:
    """dio_bench for the machine of this kernel, with the decoder of this kernel in it."""
    arch = ARCHES[linux.vehicle]
    return built(("dio_bench",), f"KERNEL_LZ4={linux.decoder.name}", *cross(arch),
                 gcc=f"{arch.cross}g++", parts=(linux.decoder,)) / "dio_bench"


def counter() -> Path:
    """The plugin for QEMU; Debian has the header that it needs in QEMU's sources only."""
    source = (REPO / "scripts/count_insns.cpp").read_text()
    header = apt.source("qemu", ["bookworm-updates", "bookworm"]) / "include/qemu/qemu-plugin.h"
    if not header.exists():
        raise Failure(f"{header}: no such file: the sources of this QEMU are laid out otherwise")

    def make(work: Path) -> None:
        # alone, or other headers beside it would be taken for those of the system
        (work / header.name).write_bytes(header.read_bytes())
        (work / "count_insns.cpp").write_text(source)
        run(["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared",
             f"-I{work}", "-o", "count_insns.so", "count_insns.cpp"], what="plugin", cwd=work)

    return entry("plugin", digest(apt.linked("g++"), source, header), make) / "count_insns.so"
