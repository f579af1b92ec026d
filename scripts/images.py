#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""The input data, the images made of it, and the truth that their files are compared with."""
import fnmatch
import functools
import inspect
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import apt
from programs import built
from tools import erofs_utils
from ui import (FULL, JOBS, Cut, Failure, cache_dir, digest, entry, main, output, run, state, step,
                walk)

MIB = 1 << 20
# Enough for steady figures; LZMA, at 50 MiB/s, would take minutes for all of it.
SAMPLE, TIMED = 200, 64 * MIB
# What a read-once reader meets: code, text and whole programs, in shares of the big file.
BIG = (("/usr/lib", ("*.so", "*.so.*"), 64 * MIB),
       ("/usr/share", ("*.txt", "*.html", "*.py", "*.p[lm]", "*.xml", "*.json", "copyright"),
        32 * MIB),
       ("/usr/include", ("*",), 16 * MIB),
       ("/usr/lib/python3", ("*.py",), 16 * MIB),
       ("/usr/bin", ("*",), 32 * MIB))
ODD_SIZES = (0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65537, MIB - 1, MIB + 1)
RUN = {"lz4-4k": ("lz4hc,9", 4), "lz4-16k": ("lz4hc,9", 16), "lz4-64k": ("lz4hc,9", 64),
       "lzma-64k": ("lzma", 64), "deflate-64k": ("deflate,6", 64), "zstd-64k": ("zstd", 64)}
# Options and the first kernel that mounts the result.
FEATURES: dict[str, tuple[str, tuple[int, int]]] = {
    "lz4-4k": ("-zlz4 -C4096", (5, 4)),
    "lz4-16k": ("-zlz4 -C16384", (5, 13)),
    "lz4hc-64k": ("-zlz4hc,9 -C65536", (5, 13)),
    "lz4-1m": ("-zlz4 -C1048576", (5, 13)),
    "lzma-4k": ("-zlzma,1 -C4096", (5, 16)),
    "lzma-64k": ("-zlzma,1 -C65536", (5, 16)),
    "deflate-16k": ("-zdeflate -C16384", (6, 6)),
    "deflate-1m": ("-zdeflate -C1048576", (6, 6)),
    "zstd-4k": ("-zzstd -C4096", (6, 10)),
    "zstd-64k": ("-zzstd -C65536", (6, 10)),
    "zstd-1m": ("-zzstd -C1048576", (6, 10)),
    "full-index": ("-zzstd -C16384 -Elegacy-compress", (6, 10)),
    "ztailpacking": ("-zlz4 -C16384 -Eztailpacking", (5, 17)),
    "lz4hc-fragments": ("-zlz4hc -C65536 -Efragments", (6, 1)),
    "all-fragments": ("-zzstd -C16384 -Eall-fragments", (6, 10)),
    # without a limit mkfs.erofs takes minutes for the runs of zeros
    "dedupe": ("-zlz4 -C16384 -Ededupe --max-extent-bytes=65536", (6, 1)),
    "dedupe-fragments-tails": ("-zlzma,1 -C32768 -Ededupe,all-fragments,ztailpacking", (6, 1)),
    "extents-48bit": ("-zlz4 -C65536 -E48bit", (6, 15)),
    "extents-48bit-dedupe": ("-zzstd -C65536 -E48bit,dedupe,fragments", (6, 15)),
    "metabox": ("-zlz4 -C65536 -m65536:zstd --MZ=id", (6, 17)),
    "lz4-block-512": ("-zlz4 -C4096 -b512 --fsalignblks=8", (6, 4)),
    "zstd-block-1024": ("-zzstd -C16384 -b1024 --fsalignblks=4", (6, 10)),
    "uncompressed": ("", (5, 4)),
    "chunks": ("--chunksize=65536", (5, 15)),
}

NESTED = {"plain": "", "lz4-64k": "-zlz4 -C65536"}
PACKED = "-zlz4 -C65536 -Eall-fragments"


@dataclass(frozen=True)
class Data:
    """A directory, and in `listing` its regular files with sizes and hashes, taken on the host."""
    truth: Path
    listing: Path

    @functools.cached_property
    def files(self) -> list[dict[str, Any]]:
        return json.loads(self.listing.read_text())

    @property
    def size(self) -> int:
        return sum(item["size"] for item in self.files)

    @property
    def big(self) -> str:
        return max(self.files, key=lambda item: item["size"])["name"]


@dataclass(frozen=True)
class Image:
    name: str
    algorithm: str
    pcluster: int
    path: Path
    data: Data
    devices: tuple[Path, ...] = ()
    unmountable: str = ""
    damaged: bool = False


def xxh3(path: Path) -> str:
    import xxhash  # may have been installed a moment ago

    total = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(4 * MIB):
            total.update(block)
    return total.hexdigest()


def describe(truth: Path, listing: Path, whose: str) -> None:
    """Write the listing: all of a file is verified, `timed` bytes of it are read by the clock."""
    paths = sorted(path for path in truth.rglob("*") if path.is_file() and not path.is_symlink())
    if not any(path.stat().st_size for path in paths):
        raise Failure(f"{whose} has no file with content: name another")
    small = [path for path in paths if 0 < path.stat().st_size <= MIB]
    timed = {max(paths, key=lambda path: path.stat().st_size), *small[::len(small) // SAMPLE + 1]}
    rows = [{"name": str(path.relative_to(truth)), "size": path.stat().st_size,
             "xxh3_128": xxh3(path),
             "timed": min(path.stat().st_size, TIMED) if path in timed else 0} for path in paths]
    try:
        listing.write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")
    except UnicodeEncodeError:
        raise Failure(f"{whose} has a file name that is not UTF-8: rename it") from None


def choose(limit: int, top: str, patterns: Iterable[str]) -> Iterator[Path]:
    """Real files below top in order of their names, up to limit bytes in all."""
    if not os.path.isdir(top):
        return
    for path in sorted(item.path for item in walk(top) if not item.is_symlink()):
        try:
            size = os.lstat(path).st_size
        except FileNotFoundError:  # packages come and go
            continue
        if 0 < size <= min(limit, 16 * MIB) and os.access(path, os.R_OK) and os.path.isfile(path) \
                and any(fnmatch.fnmatch(os.path.basename(path), one) for one in patterns):
            limit -= size
            yield Path(path)


def synthetic(root: Path, source: bytes) -> None:
    noise = random.Random(0)
    (root / "incompressible").write_bytes(noise.randbytes(16 * MIB))
    with (root / "sparse-looking").open("wb") as file:
        file.truncate(32 * MIB)
        for start in range(100_000, 32 * MIB - 200_000, 1_500_000):
            file.seek(start)
            file.write(source[start:start + noise.randrange(1, 200_000)])
    (root / "sizes").mkdir()
    for size in ODD_SIZES:
        (root / "sizes" / str(size)).write_bytes(source[:size])


def machine_data() -> Data:
    """Real files of this machine, copied once; chosen again when one of them is not what it was."""
    def identity(path: str | Path) -> list[int]:
        info = os.stat(path)
        return [info.st_size, info.st_mtime_ns]

    def unchanged(made: Path) -> bool:
        chosen = json.loads((made / "chosen.json").read_text())
        return all(os.path.exists(path) and identity(path) == old for path, old in chosen.items())

    def make(work: Path) -> None:
        with step("choosing and copying real files of this machine"):
            root = work / "files"
            (root / "small").mkdir(parents=True)
            # evenly mixed, so that the part that is timed is like the whole
            ranked = [(rank / len(paths), path) for top, patterns, share in BIG
                      for paths in [list(choose(share, top, patterns))]
                      for rank, path in enumerate(paths)]
            chosen = [path for _, path in sorted(ranked)]
            with (root / "big").open("wb") as big:
                for path in chosen:
                    big.write(path.read_bytes())
            fitting = [path for path in chosen if path.stat().st_size <= MIB]
            for path in fitting[::len(fitting) // 280 + 1]:
                shutil.copyfile(path, root / "small" / str(path).strip("/").replace("/", "+"))
            synthetic(root, (root / "big").read_bytes()[:32 * MIB])
            describe(root, work / "list.json", "/usr")
            (work / "chosen.json").write_text(json.dumps({str(p): identity(p) for p in chosen}))

    recipe = digest(repr((BIG, ODD_SIZES, SAMPLE, TIMED)), inspect.getsource(synthetic))
    made = entry("data", f"machine-{recipe}", make, unchanged)
    return Data(made / "files", made / "list.json")


def check_data(share: int) -> Data:
    """A small tree in which compressible, incompressible and zero parts meet at odd places.

    A fraction of it, 1/share, is for vehicles that are slow.
    """
    source = machine_data()

    def make(work: Path) -> None:
        root = work / "files"
        (root / "small").mkdir(parents=True)
        noise = random.Random(1)
        with (source.truth / "big").open("rb") as big, (root / "mixed").open("wb") as mixed:
            size = (source.truth / "big").stat().st_size
            while mixed.tell() < 24 * MIB // share:
                length = noise.randrange(1, MIB)
                big.seek(noise.randrange(max(1, size - length)))
                part: Callable[[], bytes] = noise.choice([
                    lambda: big.read(length), lambda: big.read(length),
                    lambda: noise.randbytes(length // 4), lambda: bytes(length)])
                mixed.write(part())
            # in front of what compresses blocks are where they are in the file, and come in runs
            big.seek(0)
            (root / "noise-first").write_bytes(noise.randbytes(MIB // share)
                                               + big.read(MIB // share // 4))
        small = sorted((source.truth / "small").iterdir())
        for path in small[::share * (len(small) // 40 + 1)]:
            shutil.copy(path, root / "small")
        shutil.copytree(source.truth / "sizes", root / "sizes")
        describe(root, work / "list.json", "/usr")

    made = entry("data", digest("check, noise first", str(share), source.listing), make)
    return Data(made / "files", made / "list.json")


def caller_data(inside: Data) -> Data:
    """The same tree with images of itself, as in Android, and a file that is not compressed."""
    def make(work: Path) -> None:
        root = work / "files"
        shutil.copytree(inside.truth, root)
        for name, options in NESTED.items():
            shutil.copy(make_image(inside, options), root / f"{name}.erofs")
        shutil.copy(make_image(Data(inside.truth / "sizes", inside.listing), PACKED),
                    root / "packed.erofs")
        (root / "noise").write_bytes(random.Random(2).randbytes(MIB))
        (root / "long").write_bytes((inside.truth / "mixed").read_bytes()[:MIB] * 36)
        describe(root, work / "list.json", "/usr")

    made = entry("data", digest("callers, long", inside.listing, mkfs()[1], repr((NESTED, PACKED))),
                 make)
    return Data(made / "files", made / "list.json")


def user_data(top: Path) -> Data:
    if not top.is_dir():
        raise Failure(f"DATA={top}: no such directory: name one with the files to compress")
    if cache_dir().resolve().is_relative_to(top.resolve()):
        raise Failure(f"DATA={top}: images of it would be kept inside, in {cache_dir()}: name "
                      "another directory, or set CACHE=")
    with step(f"hashing {top}"):
        made = entry("list", digest(str(top), state(top), repr((SAMPLE, TIMED))),
                     lambda work: describe(top, work / "list.json", f"DATA={top}"))
    return Data(top, made / "list.json")


@functools.cache
def mkfs() -> tuple[Path, str]:
    """The program, and which one it is: others may have the same version."""
    tools = erofs_utils()
    return tools / "mkfs.erofs", tools.name


def make_image(data: Data, options: str) -> Path:
    program, version = mkfs()

    def make(work: Path) -> None:
        path = work / "image.erofs"
        with step(f"mkfs.erofs {options}"):
            run([str(program), "--quiet", f"--workers={JOBS}", "-T0", "-x-1", "--all-root",
                 "-U00000000-0000-0000-0000-000000000001", *options.split(), str(path),
                 str(data.truth)], what="mkfs.erofs")
        run([str(program.with_name("fsck.erofs")), "--extract", str(path)], what="fsck.erofs")
        (work / "xxh3").write_text(xxh3(path))

    def check(made: Path) -> bool:
        return xxh3(made / "image.erofs") == (made / "xxh3").read_text()

    key = digest(version, options, str(data.truth), data.listing)
    return entry("image", key, make, check) / "image.erofs"


def pack(top: Path) -> Path:
    """The directory as an uncompressed image, for guests that do not see the host's files."""
    program, version = mkfs()

    def make(work: Path) -> None:
        run([str(program), "--quiet", "-T0", "--all-root", str(work / "image.erofs"), str(top)],
            what="mkfs.erofs")

    return entry("image", digest("pack", version, str(top), state(top)), make) / "image.erofs"


def damage(image: Image) -> Image:
    """The same image with nonsense in so many places of its data that some of it is compressed."""
    def make(work: Path) -> None:
        data = bytearray(image.path.read_bytes())
        for place in range(24, 56):
            start = len(data) * place // 64
            data[start:start + 4096] = b"\xff" * 4096
        (work / "image.erofs").write_bytes(data)

    made = entry("image", digest("damaged in many places", image.path), make)
    return replace(image, name=f"{image.name}-damaged", path=made / "image.erofs")


def run_images() -> list[Image]:
    apt.ensure()
    if path := os.environ.get("IMAGE"):
        return [user_image(Path(path).absolute())]
    data = user_data(Path(where).absolute()) if (where := os.environ.get("DATA")) \
        else machine_data()
    return [Image(name, name.partition("-")[0], size * 1024,
                  make_image(data, f"-z{algorithm} -C{size * 1024}"), data)
            for name, (algorithm, size) in RUN.items()]


def user_image(path: Path) -> Image:
    """The user's image; fsck.erofs, not a kernel, says what its files contain."""
    if not path.is_file():
        raise Failure(f"IMAGE={path}: no such file: name an EROFS image")
    tools = erofs_utils()

    def make(work: Path) -> None:
        with step(f"extracting {path} with fsck.erofs"):
            done = subprocess.run(
                [str(tools / "fsck.erofs"), f"--extract={work / 'files'}", "--no-preserve",
                 str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                errors="replace", check=False)
        if "No space left" in done.stdout:
            raise Cut(FULL)
        if done.returncode:
            why = next((line for line in done.stdout.splitlines() if "<E>" in line), "it failed")
            raise Failure(f"{path}: fsck.erofs: {why.removeprefix('<E> erofs: ').strip()}: the "
                          "image is damaged or newer than erofs-utils: make it again")
        describe(work / "files", work / "list.json", f"IMAGE={path}")
        # the name of a disk ends at a comma or space on the kernel command line
        (work / "image.erofs").symlink_to(path)

    made = entry("truth", digest(str(path), xxh3(path)), make)
    data = Data(made / "files", made / "list.json")
    dump = [str(tools / "dump.erofs"), str(path)]
    algorithms = [line.split(":")[1].split() for line in output(dump, check=False).splitlines()
                  if "compr_algs" in line]
    extents = output([*dump, "-e", f"--path=/{data.big}"], check=False).splitlines()
    lengths = [int(line.rpartition("|")[2]) for line in extents if line.count("|") == 2
               and line.rpartition("|")[2].strip().isdigit()]
    algorithm = "+".join(algorithms[0]) if algorithms else "none"
    pcluster = max(lengths, default=0) if algorithms else 0
    return Image(path.name, algorithm, pcluster, made / "image.erofs", data)


def check_images(names: Iterable[str], share: int) -> list[tuple[Image, tuple[int, int]]]:
    apt.ensure()
    data = check_data(share)
    return [(Image(name, "", 0, make_image(data, FEATURES[name][0]), data), FEATURES[name][1])
            for name in names]


def caller_image() -> Image:
    """Inodes have digests by which filesystems may share their page cache."""
    data = caller_data(check_data(1))
    return Image("callers", "zstd", 65536,
                 make_image(data, "-zzstd -C65536 -x2 --xattr-inode-digest=trusted.digest"), data)


def forge(program: Path, name: str, fsck: bool) -> Path:
    """An image of erofs_forge and its truth, which fsck.erofs has to find in it."""
    def make(work: Path) -> None:
        run([str(program), "--out", str(work), "--only", name], what="erofs_forge")
        for path in (work / name).iterdir():
            path.rename(work / path.name)
        (work / name).rmdir()
        if fsck:
            run([str(erofs_utils() / "fsck.erofs"), f"--extract={work / 'read'}", "--no-preserve",
                 str(work / "image.erofs")], what="fsck.erofs")
            run(["diff", "-r", str(work / "files"), str(work / "read")], what="forged image")
            shutil.rmtree(work / "read")
        describe(work / "files", work / "list.json", name)

    return entry("forged", digest(program, name, str(fsck)), make)


def forged_images(page: int = 4096) -> list[tuple[Image, tuple[int, int]]]:
    """What the format allows and mkfs.erofs never makes, for kernels with such pages."""
    program = built() / "erofs_forge"
    images = []
    for row in json.loads(output([str(program), "--list"])):
        made = forge(program, row["name"], not row["unknown_to_fsck"])
        why = "its blocks are larger than a page" if row["block"] > page else ""
        devices = tuple(made / f"device{n + 1}.img" for n in range(row["devices"]))
        data = Data(made / "files", made / "list.json")
        images.append((Image(row["name"], "", 0, made / "image.erofs", data, devices, why,
                             row["damaged"]),
                       tuple(row["since"])))
    return images


if __name__ == "__main__":
    main(lambda: print("\n".join(str(image.path) for image in run_images())))
