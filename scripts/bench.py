#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""make bench: what direct reads cost and gain, beside all that a reader could use instead."""
import argparse
import fnmatch
import json
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import apt
import programs
import vehicle
from images import MIB, Data, Image, describe, machine_data, make_image
from kernel import ARCHES, Kernel, kernel
from ui import (JOBS, REPO, Cut, Failure, bar, cache_dir, digest, entry, main, number, output, run,
                say, step, write)

PACKAGES = (*apt.ARM64, "squashfs-tools", "gnuplot-nox")
SIZES = {"4K": 4 << 10, "16K": 16 << 10, "64K": 64 << 10, "128K": 128 << 10, "1M": MIB,
         "8M": 8 * MIB}
# options of mkfs.erofs, pcluster, the like of mksquashfs
IMAGES = {"lz4-4k": ("lz4hc,9", 4, "lz4 -Xhc"), "lz4-16k": ("lz4hc,9", 16, "lz4 -Xhc"),
          "lz4-64k": ("lz4hc,9", 64, "lz4 -Xhc"), "lz4-1m": ("lz4hc,9", 1024, "lz4 -Xhc"),
          "zstd-64k": ("zstd", 64, "zstd"), "deflate-64k": ("deflate,6", 64, "gzip"),
          "lzma-64k": ("lzma", 64, "xz")}
QUICK = ("lz4-4k", "lz4-16k", "lz4-64k")
# each thread has a file of its own, which sequential passes read to its end: what is read ahead for
# nobody is no part of any speed; with little memory all of them, or the largest one, are several
# times what the guest has (8 threads need 100M)
PART, THREADS, LARGE = 16 * MIB, 8, 320 * MIB
# .. and smaller ones where there are many of them, or decoding takes several times as long
FILE, SMALL_FILE = 32 * MIB, 8 * MIB
# KiB that buffered reads are ahead: what Linux has for flash; the disks of the vehicles say that
# they rotate, which get 8 MiB: that is a column of its own
READ_AHEAD, FAR_AHEAD = 128, 8192
# files of incompressible data and a bit more, or mkfs.erofs doesn't compress them: blocks are at
# block boundaries of the file if they come first, and nowhere near them behind anything compressed
NOISE = (("incompressible", 0, MIB // 4), ("shifted", MIB // 4, 0))
MEMORY = {"uml": {"ample": "1G", "low": "80M"}, "qemu": {"ample": "1G", "low": "104M"}}
COUNTED = ("buffered", "far", "direct", "thp", "floor")
TOP = 15
# that a pass of the slowest decoder takes on average, and a guest to begin and to end
SECONDS, BOOT = 30, 600
DISTORTS = """
What the vehicles distort. qemu: emulated code, so that decoders, which are computation, take a
larger part of the time than on hardware, and latencies are those of the emulator; where the linker
puts functions matters as well: of two kernels which differed in direct reads only, buffered reads
were 1.3 to 1.6 apart, so compare ratios of one kernel, and none that are close. Buffered reads have
128 KiB of read-ahead, the default of Linux for flash; far: 8 MiB of it, more than what is usual
anywhere, with which buffered reads keep both CPUs busy whatever the request. uml: one CPU, so
that nothing decodes beside the reader, and mapping kernel memory (vmap), as LZ4 does for what is
not contiguous, is several times as dear as on hardware: its LZ4 ratios flatter direct reads where
they map less and are no headline. squashfs has blocks of 128 KiB, its default, whatever the
pclusters beside it. arm64: executed instructions, which know neither cache misses
nor waiting nor reclaim. Both CPUs belong to whatever else this machine did meanwhile.
"""


Rows = list[dict[str, Any]]  # of dio_bench, as it printed them


def slices(name: str, parts: dict[str, tuple[int, int]], noise: int = 0) -> Data:
    """Files that are parts of the real files of this machine, mixed evenly."""
    source = machine_data()

    def make(work: Path) -> None:
        root = work / "files"
        root.mkdir()
        whole = (source.truth / "big").read_bytes()
        for part, (start, size) in parts.items():
            start %= len(whole)
            data = (whole[start:] + whole) * (1 + size // len(whole))
            (root / part).write_bytes(data[:size])
        for name, front, behind in NOISE if noise else ():
            middle = (source.truth / "incompressible").read_bytes()[:noise - front - behind]
            (root / name).write_bytes(whole[:front] + middle + whole[:behind])
        describe(root, work / "list.json", "/usr")

    made = entry("data", digest(name, repr(parts), str(noise), repr(NOISE), source.listing),
                 make)
    return Data(made / "files", made / "list.json")


def counted_data() -> Data:
    return slices("counted", {"data": (0, PART)})


def timed_data() -> Data:
    parts = {f"{name}{i}": (i * 20 * MIB, size) for i in range(THREADS)
             for name, size in (("data", FILE), ("small", SMALL_FILE))}
    return slices("timed", {**parts, "large": (0, LARGE)}, PART)


def images_of(data: Data, names: list[str]) -> list[Image]:
    return [Image(name, name.partition("-")[0], IMAGES[name][1] * 1024,
                  make_image(data, f"-z{IMAGES[name][0]} -C{IMAGES[name][1] * 1024}"), data)
            for name in names]


def squashfs(data: Data, how: str) -> Path:
    def make(work: Path) -> None:
        with step(f"mksquashfs {how}"):
            run(["mksquashfs", str(data.truth), str(work / "image"), "-quiet", "-no-progress",
                 "-all-root", "-processors", JOBS, "-comp", *how.split()], what="mksquashfs")

    version = output(["mksquashfs", "-version"]).splitlines()[0]
    return entry("image", digest(version, how, data.listing), make) / "image"


def parameters(image: Image, vehicle_name: str, request: int, pattern: str = "sequential",
               threads: int = 1, depth: int = 0, memory: str = "ample",
               content: str = "mixed") -> dict[str, Any]:
    return {"vehicle": vehicle_name, "algorithm": image.algorithm, "pcluster": image.pcluster,
            "pattern": pattern, "request": request, "threads": threads, "depth": depth,
            "memory": memory, "data": content}


def column(name: str, device: str, files: list[str], filesystem: str = "erofs",
           extents: list[str] | None = None) -> dict[str, Any]:
    modes = {"thp": "direct", "plain": "direct", "squashfs": "buffered", "far": "buffered"}
    return {"name": name, "device": device, "filesystem": filesystem, "files": files,
            "mode": modes.get(name, name), "extents": extents or [],
            # of which User Mode Linux has none
            "huge": name in ("thp", "floor") and not device.startswith("/dev/ubd"),
            "read_ahead": FAR_AHEAD if name == "far" else READ_AHEAD}


def plan_dir(cells: list[dict[str, Any]], lists: dict[str, tuple[Path, str]]) -> Path:
    """What the guest gets: the cells, and how files of images are stored."""
    oracle = programs.oracle()
    text = json.dumps(cells, indent=1)

    def make(work: Path) -> None:
        (work / "plan.json").write_text(text)
        for name, (image, file) in lists.items():
            listed = output([str(oracle), "--image", str(image), "--extents", file])
            if not listed:
                raise Failure(f"{image}: erofs_oracle lists no extents of {file}")
            (work / name).write_text(listed)

    return entry("plan", digest(text, repr(sorted(lists.items())), oracle), make)


def symbols(built: Kernel, program: Path) -> Path:
    """Of the kernel and the program in one file: their addresses are apart."""
    def make(work: Path) -> None:
        names = output([f"{ARCHES[built.vehicle].cross}nm", str(program)])
        (work / "map").write_text(built.symbols.read_text() + names)

    return entry("symbols", digest(built.symbols, program), make) / "map"


def guest_rows(built: Kernel, rows: Rows, disks: list[Path], plan: Path, rounds: int,
               option: str = "", **more: Any) -> None:
    """Adds to the rows as they come: those of a guest that fails later tell something, too."""
    before = len(rows)

    cells = json.loads((plan / "plan.json").read_text())
    passes = sum(len(cell["columns"]) for cell in cells)
    progress = bar(passes * rounds, "passes")

    def on_line(line: str, _: vehicle.Guest) -> None:
        if row := vehicle.result(line):
            if "kernel" in row:
                row["kernel"] += f", BASE={built.base}"
            rows.append(row)
            progress.update("seconds" in row and row["round"] > 0)

    # printing messages would be measured, too; errors and panics (a warning is one) still show
    script = ("dmesg -n 4\n"
              "thp=/sys/kernel/mm/transparent_hugepage/enabled\n"
              "[ ! -e $thp ] || echo madvise > $thp\n"
              f"dio_bench --plan /truth/plan.json --mount /mnt --rounds {rounds} {option}\n")
    try:
        with progress:
            vehicle.boot(built, programs=[programs.bench(built)], disks=disks, truth=plan,
                         script=script, on_line=on_line,
                         timeout=BOOT + passes * (1 + rounds) * SECONDS, **more)
    except Failure as failure:
        why = [row["error"] for row in rows[before:] if "error" in row]
        raise Failure(why[0] if why else str(failure)) from None
    got = sum("seconds" in row and row["round"] > 0 for row in rows[before:])
    if got != passes * rounds:
        raise Failure(f"{passes * rounds} passes were asked for, {got} of them measured: "
                      "try again, and make check if it stays so")


def count(names: list[str], sizes: list[str], columns: list[str], rounds: int,
          rows: Rows) -> None:
    """Adds rows of dio_bench with the instructions of each pass."""
    built = kernel("arm64-bench")
    images = images_of(counted_data(), names)
    cells = [{"parameters": parameters(image, "arm64", SIZES[size]), "bytes": PART,
              "columns": [column(what, f"/dev/vd{chr(97 + i)}", ["data"],
                                 extents=[f"/truth/{image.name}"]) for what in columns]}
             for i, image in enumerate(images) for size in sizes]
    plan = plan_dir(cells, {image.name: (image.path, "data") for image in images})
    found: Rows = []
    with tempfile.TemporaryDirectory(prefix="count-", dir=cache_dir()) as work:
        regions = Path(work) / "regions"
        plugin = f"{programs.counter()},map={symbols(built, programs.bench(built))},out={regions}"
        with step(f"counting instructions in {len(cells)} cells"):
            guest_rows(built, found, [image.path for image in images], plan, rounds, "--count",
                       cpus=1, mem="1G", vm=["-plugin", plugin, "-icount", "shift=0,sleep=off"])
        counts = [json.loads(line) for line in regions.read_text().splitlines()]
    passes = [row for row in found if "seconds" in row]
    if len(counts) != len(passes):
        raise Failure(f"{len(passes)} passes, but {len(counts)} of them counted: try again")
    rows += [row for row in found if "seconds" not in row]
    rows += [counted(row, insns) for row, insns in zip(passes, counts) if row["round"]]


def counted(row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Per MiB. Emulated time means nothing here; the floor is what a program executes."""
    scale = row["bytes"] / MIB
    where = "user" if row["column"] == "floor" else "kernel"
    split = {name: value / scale for name, value in found[f"{where}_symbols"].items()}
    kept = {key: row[key] for key in ("cell", "column", "round", "bytes", "pages", "device_bytes")
            if key in row}
    return {**kept, "instructions": found[where] / scale, "symbols": split,
            "decoder": sum(value for name, value in split.items() if name.startswith("LZ4_"))}


def show_counts(rows: Rows, split: bool) -> None:
    cells: dict[tuple[int, int], dict[str, Rows]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: COUNTED.index(row["column"])):
        cells[row["cell"]["pcluster"], row["cell"]["request"]][row["column"]].append(row)
    print(f"{'pcluster':>9} {'request':>8} {'column':>9} {'insns/MiB':>10} {'decoder':>10} "
          f"{'beside':>9} {'/floor':>7} {'/buffered':>9} {'spread':>7}")
    for (pcluster, request), columns in cells.items():
        middle = {name: statistics.median(row["instructions"] for row in passes)
                  for name, passes in columns.items()}
        for name, passes in columns.items():
            values = [row["instructions"] for row in passes]
            against = middle[name] / middle["buffered"] if "buffered" in middle else 0
            print(f"{pcluster >> 10:>8}K {request >> 10:>7}K {name:>9} {middle[name]:10.0f} "
                  f"{statistics.median(row['decoder'] for row in passes):10.0f} "
                  f"{middle[name] - middle['floor']:9.0f} {middle[name] / middle['floor']:7.3f} "
                  f"{against:9.3f} {(max(values) - min(values)) / middle[name]:7.4f}")
    for (pcluster, request), columns in cells.items() if split else ():
        for name, passes in columns.items():
            print(f"\n{pcluster >> 10}K {request >> 10}K {name}: instructions per MiB by symbol")
            ranked = sorted(passes[-1]["symbols"].items(), key=lambda item: -item[1])
            for symbol, value in ranked[:TOP]:
                print(f"{value:12.0f} {symbol}")


def timed_cells(image: Image, on: str, memory: str, full: bool) -> Iterator[dict[str, Any]]:
    """Parameters of all cells of an image."""
    if memory == "low":
        yield parameters(image, on, MIB, memory=memory)
        yield parameters(image, on, MIB, threads=8, memory=memory)
        return
    if not full:
        for size in ("8M", "1M", "64K", "4K"):
            yield parameters(image, on, SIZES[size])
        yield parameters(image, on, MIB, threads=8)
        yield parameters(image, on, SIZES["4K"], "random")
    else:
        for pattern in ("sequential", "random"):
            for size in SIZES.values():
                for threads in (1, 2, 8):
                    for depth in (0, 8):
                        yield parameters(image, on, size, pattern, threads, depth)
    for name, _, _ in NOISE:
        yield parameters(image, on, MIB, content=name)


def work_of(cell: dict[str, Any]) -> tuple[list[str], int]:
    """The files that are read, and bytes of each thread: small random ones take their time each."""
    if cell["data"] != "mixed":
        return [cell["data"]], PART
    if cell["memory"] == "low" and cell["threads"] == 1:
        return ["large"], LARGE
    small = cell["memory"] == "ample" and (cell["threads"] > 1 or cell["algorithm"] != "lz4")
    size = SMALL_FILE if small else FILE
    if cell["pattern"] == "random":
        return ["large"], max(cell["request"], min(size // 2, 256 * cell["request"]))
    return [f"{'small' if small else 'data'}{i}" for i in range(cell["threads"])], size


def timed_columns(image: Image, cell: dict[str, Any], device: str,
                  lists: dict[str, tuple[Path, str]]) -> list[dict[str, Any]]:
    files, _ = work_of(cell)
    names = ["buffered", "far", "dropbehind", "direct"]
    # User Mode Linux has no huge pages, and a guest with little memory soon has none left
    if cell["vehicle"] != "uml" and cell["memory"] == "ample":
        names.append("thp")
    columns = [column(name, f"{device}a", files) for name in names]
    columns += [column("plain", f"{device}b", files),
                column("squashfs", f"{device}c", files, "squashfs")]
    # with little memory it would not have its input in memory
    if image.algorithm == "lz4" and cell["pattern"] == "sequential" and not cell["depth"] \
            and cell["memory"] == "ample" and cell["data"] == "mixed":
        lists.update({file: (image.path, file) for file in files})
        columns.append(column("floor", f"{device}a", files,
                              extents=[f"/truth/{file}" for file in files]))
    return columns


def times_of(cell: dict[str, Any]) -> int:
    """Mounts of a pass: the slowest hundredth of 256 requests would be two of them."""
    small = cell["pattern"] == "random" and cell["request"] <= SIZES["16K"]
    return max(1, 4 // cell["threads"]) if small else 1


def measure(on: str, name: str, rounds: int, full: bool, rows: Rows) -> None:
    built = kernel(f"{on}-bench")
    data = timed_data()
    [image] = images_of(data, [name])
    for noise, _, _ in NOISE:
        extents = output([str(programs.oracle()), "--image", str(image.path), "--extents", noise])
        if len(extents.splitlines()) <= 2:
            raise Failure(f"{image.path}: {noise} is in one piece, thus not compressed at all")
    disks = [image.path, make_image(data, ""), squashfs(data, IMAGES[name][2])]
    device = "/dev/ubd" if on == "uml" else "/dev/vd"
    for memory, size in MEMORY[on].items():
        lists: dict[str, tuple[Path, str]] = {}
        cells = [{"parameters": cell, "bytes": work_of(cell)[1],
                  "times": times_of(cell), "columns": timed_columns(image, cell, device, lists)}
                 for cell in timed_cells(image, on, memory, full)]
        with step(f"{on}, {memory} memory, {name}: {len(cells)} cells"):
            guest_rows(built, rows, disks, plan_dir(cells, lists), rounds, mem=size)


def plot(cells: list[dict[str, Any]], out: Path) -> None:
    """Ratios by request size, a line for each kind of image: what is above 1 is faster."""
    for metric, title, below in (("mib_s", "throughput, direct / buffered", "buffered"),
                                 ("instructions", "instructions, direct / floor", "floor")):
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for item in cells:
            cell, ratios = item["cell"], item["ratios"]
            usual = (cell["pattern"], cell["threads"], cell["depth"], cell["memory"],
                     cell["data"]) == ("sequential", 1, 0, "ample", "mixed")
            for name in ("direct", "thp"):
                value = ratios.get(f"{name}/{below}", {}).get(metric)
                if usual and value:
                    lines[f"{cell['vehicle']} {cell['algorithm']} {cell['pcluster'] >> 10}K "
                          f"{name}"].append((cell["request"], value["median"]))
        if not lines:
            continue
        blocks = "\n\n\n".join(f'"{name}"\n' + "\n".join(f"{x / 1024} {y}" for x, y in sorted(xy))
                               for name, xy in lines.items())
        data = out / f"bench-{metric}.dat"
        data.write_text(blocks + "\n")
        script = (f"set terminal svg size 900,500; set output '{out}/bench-{metric}.svg';"
                  "set logscale x 2; set xlabel 'request, KiB'; set yrange [0:*]; set grid;"
                  f"set key outside; set title '{title}';"
                  f"plot for [i=0:{len(lines) - 1}] '{data}' index i using 1:2 with linespoints "
                  "title columnheader(1), 1 with lines dt 2 notitle")
        run(["gnuplot", "-e", script], what="gnuplot")


def save(rows: Rows) -> Path:
    path = REPO / "out/bench.rows"
    path.parent.mkdir(exist_ok=True)
    write(path, "".join(json.dumps({key: value for key, value in row.items() if key != "symbols"})
                        + "\n" for row in rows))
    return path


def report(rows: Rows) -> None:
    found = save(rows)
    out = found.parent
    new, json_file = out / "bench-new.json", out / "bench.json"
    program = programs.built(("dio_report",)) / "dio_report"
    run([str(program), str(found), "--json", str(new), "--markdown", str(out / "bench.md"),
         "--before", str(json_file)], what="dio_report")
    if json_file.exists():
        json_file.rename(out / "bench-before.json")
    new.rename(json_file)
    with (out / "bench.md").open("a") as markdown:
        markdown.write(DISTORTS)
    plot(json.loads(json_file.read_text())["cells"], out)
    print((out / "bench.md").read_text(), flush=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", action="store_true",
                        help="show instructions on arm64, measure nothing else")
    parser.add_argument("--cell", default="", help="of --count only these, as in "
                        "lz4-4k,1M,direct,thp; all of what is not named")
    parser.add_argument("--rounds", type=int, default=number("ROUNDS", 3),
                        help="that are measured (default: ROUNDS, or 3)")
    return parser.parse_args()


def parts(rounds: int, full: bool) -> dict[str, Callable[[Rows], None]]:
    """What ONLY= chooses from."""
    every: dict[str, Callable[[Rows], None]] = {"count": partial(
        count, list(QUICK) if full else ["lz4-4k", "lz4-64k"],
        list(SIZES) if full else ["64K", "1M"], list(COUNTED), rounds)}
    for name in IMAGES if full else QUICK:
        every[f"qemu.{name}"] = partial(measure, "qemu", name, rounds, full)
    # beside it, and of what is quick only: with one CPU and dear mappings it tells little
    for name in QUICK if full else ():
        every[f"uml.{name}"] = partial(measure, "uml", name, rounds, full)
    only = os.environ.get("ONLY") or "*"
    some = {name: part for name, part in every.items()
            if fnmatch.fnmatch(name, only) or fnmatch.fnmatch(name.rpartition(".")[2], only)}
    if not some:
        raise Failure(f"ONLY={only} matches none of {', '.join(every)}")
    return some


def all_parts(wanted: dict[str, Callable[[Rows], None]]) -> None:
    """What has been measured is reported, whatever happens to the rest."""
    # what cannot be built fails once, and before anything else takes hours
    for on in dict.fromkeys(name.partition(".")[0] for name in wanted):
        kernel("arm64-bench" if on == "count" else f"{on}-bench")
    rows: Rows = []
    missing = list(wanted)
    try:
        for name, part in wanted.items():
            try:
                part(rows)
                missing.remove(name)
            except Cut:
                raise
            except Failure as failure:
                say(f"{name}: {failure}")
            save(rows)
    finally:
        text = f"not measured, or not all of it: {', '.join(missing)}"
        if any("cell" in row for row in rows):
            report([*rows, {"note": text}] if missing else rows)
            say("figures of one run of this machine: see out/bench.md, .json and the plots")
        if missing:
            say(f"error: {text}")
    if missing:
        sys.exit(1)


def chosen(words: set[str], names: list[str]) -> list[str]:
    return [name for name in names if name in words] or names


def bench() -> None:
    args = options()
    apt.ensure(*PACKAGES)
    if args.rounds < 1:
        raise Failure(f"--rounds {args.rounds}: at least one is needed")
    if args.cell and not args.count:
        raise Failure("--cell is for --count only: add it")
    words = {word for word in args.cell.split(",") if word}
    if unknown := words - {*QUICK, *SIZES, *COUNTED}:
        raise Failure(f"--cell: no such thing as {', '.join(sorted(unknown))}: there are "
                      f"{', '.join([*QUICK, *SIZES, *COUNTED])}")
    if args.count:
        columns = dict.fromkeys([*chosen(words, list(COUNTED)), "floor"])
        rows: Rows = []
        count(chosen(words, list(QUICK)), chosen(words, list(SIZES)), list(columns), args.rounds,
              rows)
        show_counts([row for row in rows if "cell" in row], bool(words))
        return
    all_parts(parts(args.rounds, bool(number("FULL"))))


if __name__ == "__main__":
    main(bench)
