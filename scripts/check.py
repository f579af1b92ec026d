#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""make check: KUnit suites at boot, then dio_read over an image of each on-disk feature."""
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import vehicle
from images import check_images, damage
from kernel import Kernel, kernel
from programs import programs
from ui import REPO, Failure, main, say, step

TIMEOUT = 300
DAMAGED = ("lz4-4k", "lzma-64k", "zstd-64k")
CLOCK = re.compile(r"^\[ *\d+\.\d{6}\] ")
VERSION = re.compile(r"^K?TAP version \d+$")
PLAN = re.compile(r"^1\.\.(\d+)")
RESULT = re.compile(r"^(not )?ok (\d+)(?: - | )([^#]*?)(?: # (SKIP)\b *(.*))?$")


@dataclass
class Test:
    name: str
    result: str
    seconds: float
    reason: str = ""


@dataclass
class Frame:
    indent: int
    name: str = ""
    planned: int | None = None
    seen: int = 0
    bad: int = 0
    notes: list[str] = field(default_factory=list)


class Ktap:
    """Takes console lines as they come; a result that is announced and missing is a failure."""

    def __init__(self, tests: list[Test], guest_name: str) -> None:
        self.tests = tests
        self.guest_name = guest_name
        self.frames: list[Frame] = []
        self.since = time.monotonic()

    def add(self, name: str, result: str, reason: str = "") -> None:
        now = time.monotonic()
        suites = [frame.name for frame in self.frames if frame.name] or [self.guest_name]
        path = ".".join([*suites, name])
        self.tests.append(Test(path, result, round(now - self.since, 3), reason))
        self.since = now
        for frame in self.frames:
            frame.bad += result == "failed"

    def close(self) -> Frame:
        frame = self.frames[-1]
        # parameters of a parameterised test come without a plan
        if frame.planned != frame.seen and (frame.planned is not None or len(self.frames) < 3):
            self.add("plan", "failed", f"{frame.seen} results of {frame.planned or 'a plan'}")
        return self.frames.pop()

    def line(self, raw: str) -> None:
        text = CLOCK.sub("", raw)
        indent = len(text) - len(text.lstrip(" "))
        text = text.strip()
        if VERSION.match(text):
            while self.frames and self.frames[-1].indent >= indent:
                self.close()
            self.frames.append(Frame(indent))
            self.since = time.monotonic()
        elif text.startswith("Bail out!"):
            self.add("start", "failed", text)
        elif not self.frames:
            return
        elif plan := PLAN.match(text):
            self.frames[-1].planned = int(plan[1])
        elif text.startswith("# Subtest: "):
            self.frames[-1].name = text.removeprefix("# Subtest: ")
        elif text.startswith("# "):
            self.frames[-1].notes.append(text.removeprefix("# "))
        elif result := RESULT.match(text):
            self.result(indent, result)
        elif indent and self.frames[-1].notes:
            self.frames[-1].notes.append(text)

    def result(self, indent: int, match: re.Match[str]) -> None:
        inner: Frame | None = None
        while len(self.frames) > 1 and self.frames[-1].indent > indent:
            inner = self.close()
        frame = self.frames[-1]
        frame.seen += 1
        if int(match[2]) != frame.seen:
            self.add(match[3], "failed", f"result {match[2]} where {frame.seen} was due")
        elif inner is None or not inner.seen:
            verdict = "failed" if match[1] else "skipped" if match[4] else "passed"
            reason = "; ".join(frame.notes) if match[1] else match[5] or ""
            self.add(match[3], verdict, reason)
        elif bool(match[1]) != bool(inner.bad):
            self.add(match[3], "failed", "the suite and its tests disagree")
        frame.notes.clear()

    def end(self) -> None:
        while self.frames:
            self.close()


def guest(tests: list[Test], name: str, built: Kernel, **boot: Any) -> None:
    """One boot; whatever ends it early is a failed test, and the others still run."""
    ktap, start = Ktap(tests, name), time.monotonic()
    first = len(tests)
    try:
        vehicle.boot(built.linux, timeout=TIMEOUT, on_line=ktap.line, **boot)
    except Failure as failure:
        ktap.frames.clear()
        ktap.since = start
        ktap.add("guest", "failed", str(failure))
    ktap.end()
    if len(tests) == first:
        ktap.add("results", "failed", "the guest printed none")
    bad = [test for test in tests[first:] if test.result != "passed"]
    say(f"{name}: {len(tests) - first - len(bad)} of {len(tests) - first} passed, "
        f"{time.monotonic() - start:.1f} s")


def all_tests() -> list[Test]:
    tests: list[Test] = []
    built = kernel()
    version = tuple(int(part) for part in re.findall(r"\d+", built.version)[:2])
    images = check_images()
    tools = programs()
    with step(f"testing Linux {built.version}"):
        guest(tests, "kunit", built, programs=[], script="true",
              args=["kunit.enable=1", "kunit.filter_glob=erofs*"])
        for image, since in images:
            if version < since:
                reason = f"Linux {built.version} is older than {since[0]}.{since[1]}"
                tests.append(Test(image.name, "skipped", 0, reason))
                continue
            guest(tests, image.name, built, programs=tools, disks=[image.path],
                  script="mke2fs /dev/ram0 8192 > /dev/null && mkdir /tmp/ext2\n"
                  "mount -t ext2 /dev/ram0 /tmp/ext2\n"
                  "mount -t erofs -o ro /dev/ubda /mnt\n"
                  f"dio_read --private /tmp/ext2 --name {image.name} --mount /mnt "
                  f"--truth /host{image.data.truth} || true\n")
            if image.name in DAMAGED:
                broken = damage(image)
                guest(tests, broken.name, built, programs=tools, disks=[broken.path],
                      script="mount -t erofs -o ro /dev/ubda /mnt\n"
                      f"dio_read --damaged --name {broken.name} --mount /mnt "
                      f"--truth /host{image.data.truth} || true\n")
    return tests


def check() -> None:
    tests = all_tests()
    counts = {result: sum(test.result == result for test in tests)
              for result in ("passed", "failed", "skipped")}
    out = REPO / "out"
    out.mkdir(exist_ok=True)
    rows = [{key: value for key, value in asdict(test).items() if key != "reason" or value}
            for test in tests]
    (out / "check.json").write_text(json.dumps({**counts, "tests": rows}, indent=1) + "\n")
    for test in tests:
        if test.result != "passed":
            print(f"{test.result}: {test.name}: {test.reason}")
    print(", ".join(f"{count} {result}" for result, count in counts.items()), flush=True)
    if counts["failed"] or not counts["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main(check)
