#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""make run: direct and buffered reads of compressed images side by side, every byte verified."""
import json
import re
import shlex
import statistics
from pathlib import Path
from typing import Any

import vehicle
from images import TIMED, Image, run_images
from kernel import Kernel, kernel
from programs import programs
from ui import REPO, Failure, main, say, step, write

ROUNDS = 5
COLUMNS = (("algorithm", "algorithm", "{}"), ("pcluster", "pcluster", "{}"),
           ("image/data", "image_ratio", "{:.3f}"), ("buffered", "buffered_mib_s", "{:.0f} MiB/s"),
           ("direct", "direct_mib_s", "{:.0f} MiB/s"), ("direct/buffered", "ratio", "{:.2f}"),
           ("in CPU time", "cpu_ratio", "{:.2f}"), ("pages left", "pages_left", "{}"),
           ("verified", "verified", "{}"))
NOTES = """
Medians of {rounds} alternating rounds of 1 MiB reads of {timed} MiB (the first {big} of the big
file and a sample of small ones), image mounted anew for each. Every byte of every file was
compared, by hashes taken on the host. Ratios above 1: direct is faster.
What this vehicle distorts: User Mode Linux has one CPU, so buffered reads cannot decode ahead on
another one, and each vmap of LZ4 input or output costs system calls of the host, several times
what hardware takes. A RAM disk instead of the image file changes the ratios by less than a tenth.
Honest figures come from real hardware, or from counting instructions.

What to try next:
  make check           each on-disk feature, byte by byte, at odd offsets, lengths and addresses
  make run DATA=dir    the same table for your files
  make run IMAGE=file  the same for your own image
  make run BASE=6.12   the same on an older kernel
  make series          the patches, ready to send"""


def measure(built: Kernel, image: Image, tools: list[Path]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    marks: list[float] = []
    trouble: list[str] = []

    def on_line(line: str, guest: vehicle.Guest) -> str | None:
        if line == "@cpu":
            marks.append(guest.cpu_seconds())
            return "noted"
        if row := vehicle.result(line):
            rows.append(row)
            if "pass" in row:
                row["cpu"] = marks[-1] - marks[-2]
        elif re.search(r"\] erofs .*: ", line) and "mounted with root" not in line:
            trouble.append(line)
        return None

    try:
        vehicle.boot(built, programs=tools, disks=[image.path], on_line=on_line,
                     timeout=120 + image.data.size / (1 << 20),
                     script="dio_speed --device $DISK_A --mount /mnt "
                     f"--list {shlex.quote(f'/host{image.data.listing}')} --rounds {ROUNDS}\n")
    except Failure as failure:
        why = [row["error"] for row in rows if "error" in row] or trouble or [str(failure)]
        raise Failure(f"{image.path}: {why[0]}: try make check, or another image or BASE") from None
    return row_of(image, rows)


def row_of(image: Image, rows: list[dict[str, Any]]) -> dict[str, Any]:
    checks = [row for row in rows if "verify" in row]
    for row in checks:
        for wrong in row["wrong"]:
            say(f"WRONG BYTES, {row['verify']}: {wrong['name']}: expected hash "
                f"{wrong['expected']}, got {wrong['got']}")
    passes = {mode: [row for row in rows if row.get("pass") == mode]
              for mode in ("buffered", "direct")}

    def speed(mode: str, per: str) -> float:
        return statistics.median(row["bytes"] / row[per] for row in passes[mode]) / (1 << 20)

    complete = (len(passes["direct"]) == len(passes["buffered"]) == ROUNDS
                and sorted(row["verify"] for row in checks) == ["buffered", "direct"]
                and all(row["files"] == len(image.data.files) for row in checks))
    if not complete:
        raise Failure(f"{image.path}: the guest left results out: try make check")
    return {
        "algorithm": image.algorithm, "pcluster": image.pcluster,
        "image_ratio": round(image.path.stat().st_size / image.data.size, 4),
        "buffered_mib_s": round(speed("buffered", "seconds"), 1),
        "direct_mib_s": round(speed("direct", "seconds"), 1),
        "ratio": round(speed("direct", "seconds") / speed("buffered", "seconds"), 3),
        "cpu_ratio": round(speed("direct", "cpu") / speed("buffered", "cpu"), 3),
        "pages_left": sum(row["pages"] for row in rows
                          if "direct" in (row.get("pass"), row.get("verify"))),
        "not_direct": sum(row["not_direct"] for row in checks),
        "verified": not any(row["wrong"] for row in checks)}


def table(rows: list[dict[str, Any]]) -> str:
    cells = [[title for title, _, _ in COLUMNS]]
    for row in rows:
        pcluster = f"{row['pcluster'] // 1024}K" if row["pcluster"] else "-"
        shown = {**row, "pcluster": pcluster, "verified": "yes" if row["verified"] else "NO"}
        cells.append([form.format(shown[key]) for _, key, form in COLUMNS])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths))
                     for line in cells)


def run_all() -> None:
    built = kernel()
    images = run_images()
    tools = programs()
    rows = []
    for image in images:
        with step(f"reading {image.name} on Linux {built.version}"):
            rows.append(measure(built, image, tools))
    out = REPO / "out"
    out.mkdir(exist_ok=True)
    write(out / "run.json", json.dumps({"kernel": built.version, "base": built.base, "rows": rows},
                                       indent=1) + "\n")
    data = images[0].data
    print(f"\nLinux {built.version}, {len(data.files)} files, {data.size >> 20} MiB of data\n")
    print(table(rows))
    print(NOTES.format(rounds=ROUNDS, big=TIMED >> 20,
                       timed=sum(item["timed"] for item in data.files) >> 20), flush=True)
    for row in rows:
        if row["not_direct"]:
            say(f"{row['algorithm']}, {row['pcluster'] >> 10}K: {row['not_direct']} reads or more "
                "went through the page cache")
    if bad := [row for row in rows
               if not row["verified"] or row["pages_left"] or row["not_direct"]]:
        raise Failure(f"{len(bad)} of {len(rows)} rows read wrong bytes, were not all direct or "
                      "left pages in the page cache: see the table and make check")


if __name__ == "__main__":
    main(run_all)
