#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Kernel sources with the series applied, and what the vehicles boot built from them."""
import contextlib
import os
import platform
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import apt
import series
from ui import (JOBS, REPO, Cut, Failure, bar, cache_dir, digest, entry, git_files, locked, main,
                output, run, say, state, step, walk)

SUITES = {
    "7.3": ["trixie-backports", "forky", "sid", "experimental", "trixie"],
    "6.12": ["bookworm-security", "bookworm-updates", "bookworm"],
}
CONFIG = REPO / "scripts/config"
# what the floor of make bench is made of
DECODER = ("LZ4_decompress_safe", "LZ4_decompress_safe_partial")
# what no build here reads; a third of all bytes of the sources
UNUSED = "*/drivers/gpu/drm/amd/include"
ENV = {"KBUILD_BUILD_USER": "erofs", "KBUILD_BUILD_HOST": "localhost",
       "KBUILD_BUILD_TIMESTAMP": "1970-01-01"}


@dataclass(frozen=True)
class Arch:
    """What a vehicle calls a kernel: ARCH of make, its target, where that is, lines it prints,
    the parts of its configuration, its objects with memcpy(), the names of its compiler."""
    name: str
    target: str
    image: str
    lines: int
    configs: tuple[str, ...]
    copies: tuple[str, ...]
    cross: str = ""


ARCHES = {
    "uml": Arch("um", "linux", "linux", 1130, ("uml",),
                ("arch/x86/um/../lib/memcpy_64.o", "arch/x86/um/../lib/memmove_64.o")),
    "qemu": Arch("x86_64", "bzImage", "arch/x86/boot/bzImage", 1700, ("qemu", "qemu-x86_64"),
                 ("arch/x86/lib/memcpy_64.o", "arch/x86/lib/memmove_64.o")),
    "arm64": Arch("arm64", "Image", "arch/arm64/boot/Image", 1700, ("qemu", "qemu-arm64"),
                  ("arch/arm64/lib/memcpy.o", "arch/arm64/lib/memset.o"), "aarch64-linux-gnu-"),
}


@dataclass(frozen=True)
class Origin:
    """Sources before the series: a name that changes with their content, and how to get them."""
    base: str
    name: str
    pristine: Callable[[], Path]


@dataclass(frozen=True)
class Kernel:
    """A bootable file; its variant is the vehicle, maybe with "-san" or "-bench"."""
    variant: str
    base: str
    version: str
    linux: Path

    @property
    def vehicle(self) -> str:
        return self.variant.partition("-")[0]

    @property
    def symbols(self) -> Path:
        """Of a "-bench" variant: names and addresses of its functions."""
        return self.linux.with_name("System.map")

    @property
    def decoder(self) -> Path:
        """Of a "-bench" variant: the object with its LZ4 decoder, to be linked elsewhere."""
        return self.linux.with_name("lz4.o")


def kernel_version(tree: Path) -> str:
    found = dict(re.findall(r"^(VERSION|PATCHLEVEL|SUBLEVEL|EXTRAVERSION) *= *(\S*)$",
                            (tree / "Makefile").read_text(errors="replace"), re.M))
    if "VERSION" not in found:
        raise Failure(f"{tree} is no kernel tree: its Makefile has no VERSION")
    return "{VERSION}.{PATCHLEVEL}.{SUBLEVEL}{EXTRAVERSION}".format(**found)


def _unpack(deb: Path) -> Path:
    def make(work: Path) -> None:
        with step(f"unpacking {deb.name}"):
            run(["bash", "-o", "pipefail", "-c",
                 'dpkg-deb --fsys-tarfile "$1" | tar -xO --wildcards "./usr/src/*.tar.xz" |'
                 ' xz -dc -T0 | tar -xv --strip-components=1 --exclude="$2"', "unpack",
                 str(deb), UNUSED], what=f"unpacking of {deb.name}", cwd=work, total=100_000)

    return entry("pristine", deb.parent.name, make)


def _debian(base: str) -> Origin:
    pattern = re.escape(base) + r"\.\d+"  # a release, not a release candidate
    deb = apt.download(f"linux-source-{base}", pattern, SUITES[base])
    return Origin(base, deb.parent.name, lambda: _unpack(deb))


def _copy(names: list[str], source: Path, target: Path) -> None:
    for name in bar_over(names, f"copying {source}"):
        to = target / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, to, follow_symlinks=False)


def bar_over(names: list[str], text: str) -> Iterator[str]:
    with bar(len(names), text) as progress:
        for name in names:
            yield name
            progress.update()


def _own(source: Path, base: str | None) -> Origin:
    if not (source / "Makefile").is_file() or not (source / "fs/erofs").is_dir():
        raise Failure(f"KSRC={source} is no kernel tree: it needs a Makefile and fs/erofs")
    base = base or ".".join(kernel_version(source).split(".")[:2])
    if base not in SUITES:
        raise Failure(f"KSRC={source} is Linux {base}: set BASE to the series to try "
                      f"({' or '.join(SUITES)})")
    names = git_files(source)
    if not names:
        if (source / ".config").exists() or (source / "include/config").exists():
            raise Failure(f"KSRC={source} was built in: run make mrproper there")
        names = [os.path.relpath(item.path, source) for item in walk(str(source), (".git",))]
    now = digest(*sorted(f"{name} {(info := os.lstat(source / name)).st_size} {info.st_mtime_ns}"
                         for name in names))
    key = f"ksrc-{digest(str(source))}"

    def make(work: Path) -> None:
        with step(f"copying {source}"):
            _copy(names, source, work)
        (work / ".state").write_text(now)

    return Origin(base, f"{key}-{now}", lambda: entry(
        "pristine", key, make, lambda tree: (tree / ".state").read_text() == now))


def origin() -> Origin:
    if platform.machine() != "x86_64":
        raise Failure(f"this machine is {platform.machine()}: User Mode Linux needs x86_64")
    base = os.environ.get("BASE")
    if base and base not in SUITES:
        raise Failure(f"BASE={base}: there is a series for {' and '.join(SUITES)} only")
    if source := os.environ.get("KSRC"):
        return _own(Path(source).resolve(), base)
    try:
        return _debian(base or "7.3")
    except apt.Gone as gone:
        if base:
            raise Failure(f"{gone}: use BASE=6.12 or KSRC=") from None
        say(f"{gone}: taking BASE=6.12 instead")
        return _debian("6.12")


def sync(pristine: Path, tree: Path, wanted: dict[str, bytes]) -> None:
    """Make tree the pristine one plus wanted; what is right already keeps its time for make."""
    if not tree.exists():
        new = tree.with_name("tree.new")
        shutil.rmtree(new, ignore_errors=True)
        run(["cp", "-al", str(pristine), str(new)], what="copy of the kernel tree")
        new.rename(tree)
    old, new = ({item.path[len(str(top)) + 1:]: item.inode() for item in walk(str(top))}
                for top in (pristine, tree))
    for name in new.keys() - old.keys() - wanted.keys():
        (tree / name).unlink()
    for name in old.keys() | wanted.keys():
        if name not in wanted and new.get(name) == old[name]:
            continue
        target = tree / name
        if name not in wanted and (pristine / name).is_symlink():
            target.unlink(missing_ok=True)
            shutil.copy(pristine / name, target, follow_symlinks=False)
            continue
        data = wanted[name] if name in wanted else (pristine / name).read_bytes()
        if name not in new or target.read_bytes() != data:
            # the old file may be a hard link to the pristine one: never write into it
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.write_bytes(data)
            if name in old:
                shutil.copymode(pristine / name, target)


def fragments(variant: str, base: str, commits: list[series.Commit]) -> list[Path]:
    # "common", those of the vehicle, the other parts of the variant, the base: as far as there are
    # such files
    vehicle, *more = variant.split("-")
    names = dict.fromkeys(["common", *ARCHES[vehicle].configs, *more, variant, base,
                           f"{vehicle}-{base}",
                           *(["dio"] if commits else [])])
    return [path for name in names if (path := CONFIG / f"{name}.config").exists()]


def make(arch: Arch, tree: Path, build: Path, *targets: str, what: str, total: int | None = None,
         log: Path | None = None) -> None:
    run(["make", "-C", str(tree), f"O={build}", f"ARCH={arch.name}",
         f"CROSS_COMPILE={arch.cross}", f"-j{JOBS}", *targets],
        what=what, env=ENV, total=total, log=log)


def configure(arch: Arch, tree: Path, build: Path, texts: list[str]) -> None:
    wanted = build / ".wanted"
    wanted.write_text("\n".join(texts))
    make(arch, tree, build, f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig",
         what="kernel configuration")
    line = re.compile(r"^(?:CONFIG_(\w+)=(.*)|# CONFIG_(\w+) is not set)$", re.M)

    def values(text: str) -> dict[str, str]:
        return {a or b: value or "n" for a, value, b in line.findall(text)}

    got = values((build / ".config").read_text())
    for symbol, value in values(wanted.read_text()).items():
        if got.get(symbol, "n") != value:
            raise Failure(f"CONFIG_{symbol}={value} got lost in this kernel's configuration "
                          f"(now {got.get(symbol, 'n')}): mend scripts/config")


@contextlib.contextmanager
def workplace(source: Origin, variant: str) -> Iterator[tuple[Path, Path, Path]]:
    """Pristine tree, patched tree and build directory, ours until the end of the block."""
    top = cache_dir() / "work" / re.sub(r"-\w{20}$", "", source.name)
    with locked(top.with_name(f".{top.name}.lock")):
        pristine = source.pristine()
        made_from = top / "made-from"
        seal = state(pristine)
        if not made_from.exists() or made_from.read_text() != seal:
            shutil.rmtree(top, ignore_errors=True)
            top.mkdir(parents=True)
            made_from.write_text(seal)
        yield pristine, top / "tree", top / f"build-{variant}"


def erofs(tree: Path, build: Path, base: str, *more: str, without: str = "") -> list[str]:
    """All warnings of fs/erofs, on a tree that may have only a part of the series, and without
    the options of that pattern."""
    dio = (CONFIG / "dio.config").read_text()
    kconfig = (tree / "fs/erofs/Kconfig").read_text()
    symbols = [name for name in re.findall(r"^CONFIG_(\w+)=y$", dio, re.M)
               if re.search(rf"^config {name}$", kconfig, re.M)]
    texts = [path.read_text() for path in fragments("uml", base, [])]
    texts += [f"CONFIG_{name}=y" for name in symbols]
    if without:
        texts = [re.sub(rf"^CONFIG_(?:{without})=y$", "", text, flags=re.M) for text in texts]
    configure(ARCHES["uml"], tree, build, texts)
    shutil.rmtree(build / "fs/erofs", ignore_errors=True)  # only what is compiled can warn
    log = build / "erofs.log"
    make(ARCHES["uml"], tree, build, "W=1", *more, "fs/erofs/", what="build of fs/erofs", total=60,
         log=log)
    return re.findall(r"^.*\b(?:warning|error):.*$", log.read_text(), re.I | re.M)


def compare(before: list[str], after: list[str]) -> None:
    """Fail on warnings that the unpatched kernel does not have, wherever its lines are now."""
    fresh = Counter(re.sub(r":[\d:]+", "", line) for line in after)
    fresh -= Counter(re.sub(r":[\d:]+", "", line) for line in before)
    if fresh:
        raise Failure(f"the series adds {fresh.total()} warnings to fs/erofs: {next(iter(fresh))}")


def checkpatch(tree: Path, *args: str, what: str) -> None:
    # in the tree, or its SPDX check takes this repository for the kernel's
    run(["perl", "scripts/checkpatch.pl", "--strict", *args], what=what, cwd=tree)


@contextlib.contextmanager
def whole(build: Path) -> Iterator[None]:
    """Begin anew after a build that was cut off: objects may be truncated and yet look current."""
    mark = build / ".cut-off"
    if mark.exists():
        shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    mark.touch()
    try:
        yield
    except Cut:
        raise
    except BaseException:
        mark.unlink()
        raise
    mark.unlink()


def built_of(commits: list[series.Commit]) -> list[series.Commit]:
    """The commits without programs of user space and documents: no kernel changes with them."""
    return [replace(commit, files={name: data for name, data in commit.files.items()
                                   if not name.startswith(("tools/", "Documentation/"))})
            for commit in commits]


def keep_decoder(arch: Arch, objects: Path, work: Path) -> None:
    """The decoder with the memcpy() it calls as one object without names that clash with libc's."""
    shutil.copy2(objects / "System.map", work)
    parts = [str(objects / part) for part in ("lib/lz4/lz4_decompress.o", *arch.copies)]
    target = str(work / "lz4.o")
    run([f"{arch.cross}ld", "-r", "-o", target, *parts], what="decoder")
    run([f"{arch.cross}objcopy", *(f"--keep-global-symbol={name}" for name in DECODER), target],
        what="decoder")


def kernel(variant: str = "uml") -> Kernel:
    arch = ARCHES[variant.partition("-")[0]]
    apt.ensure(*(apt.ARM64 if arch.cross else ()))
    source = origin()
    commits = built_of(series.load(source.base))
    texts = [path.read_text() for path in fragments(variant, source.base, commits)]
    gcc = output([f"{arch.cross}gcc", "--version"]).splitlines()[0]
    # commits hold the content they were read with: what is built is what the key says
    key = digest(source.base, source.name, variant, gcc, repr(commits), repr((arch, DECODER)),
                 *texts)

    def build(work: Path) -> None:
        with workplace(source, variant) as (pristine, tree, objects):
            version = kernel_version(pristine)
            sync(pristine, tree, series.apply(commits, pristine, version))
            with step(f"building Linux {version} ({variant}, {len(commits)} commits)"), \
                    whole(objects):
                configure(arch, tree, objects, texts)
                make(arch, tree, objects, arch.target, what=f"kernel build {variant}",
                     total=arch.lines)
            shutil.copy2(objects / arch.image, work / "linux")
            if "bench" in variant.split("-"):
                keep_decoder(arch, objects, work)
            (work / "version").write_text(version)

    done = entry("kernel", key, build)
    return Kernel(variant, source.base, (done / "version").read_text(), done / "linux")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not set(sys.argv[1].split("-")) <= {*ARCHES, "san", "bench", "16k"}:
        sys.exit("usage: kernel.py {uml,qemu,arm64}[-san][-bench][-16k]")
    main(lambda: print(kernel(sys.argv[1]).linux))
