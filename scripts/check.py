#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""make check: KUnit suites at boot, then direct reads of an image of each on-disk feature."""
import fnmatch
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import apt
import vehicle
from images import FEATURES, Image, caller_image, check_images, damage, forged_images
from kernel import Kernel, kernel
from programs import programs
from ui import JOBS, REPO, WEEK, Failure, main, number, say, step, write

TIMEOUT = {"uml": 900, "qemu": 1800, "arm64": 1800}
SLOWER = 2  # with sanitizers
MEMORY = 2 << 30  # that a guest may come to need, QEMU's own included
BOTH = ("qemu", "uml")
ON_QEMU = ("lz4hc-64k", "zstd-64k", "lz4hc-fragments")
# small: what was once written to it is never given back; by way of a loop device, because what is
# read from memory at once does not stay in the swap cache
SWAP = "losetup /dev/loop7 /dev/ram1\nmkswap /dev/loop7 65536 > /dev/null\nswapon /dev/loop7\n"
# some tests failed, and the console tells which; with any other status, nobody would know
FAILED = "|| [ $? = 1 ]\n"
READS = 5000
READS_PER_SECOND = 20  # of the slowest image, on a busy machine
DAMAGED = ("lz4-4k", "lz4hc-64k", "lzma-64k", "zstd-64k")
CLOCK = re.compile(r"^\[ *\d+\.\d{6}\] ")
VERSION = re.compile(r"^K?TAP version \d+$")
PLAN = re.compile(r"^1\.\.(\d+)")
RESULT = re.compile(r"^(not )?ok (\d+)(?: - | )([^#]*?)(?: # (SKIP)\b *(.*))?$")


@dataclass(frozen=True)
class Settings:
    """What the user asked for."""
    san: bool
    soak: int
    reads: int
    seed: int
    only: str
    replay: str
    pages: str

    @property
    def vehicles(self) -> tuple[str, ...]:
        return BOTH if self.pages == "4K" else ("arm64",)

    @property
    def variant(self) -> str:
        return ("-san" if self.san else "") + ("" if self.pages == "4K" else "-16k")

    @property
    def page(self) -> int:
        return int(self.pages.removesuffix("K")) << 10

    @property
    def seconds(self) -> int:
        """That a guest may need for what was asked for beyond the usual."""
        return min(2 * self.soak + max(0, self.reads - READS) // READS_PER_SECOND, WEEK)

    @staticmethod
    def read() -> "Settings":
        pages = os.environ.get("PAGES") or "4K"
        if pages not in ("4K", "16K"):
            raise Failure(f"PAGES={pages}: set it to 4K or 16K")
        if number("SOAK") > WEEK // 2:
            raise Failure(f"SOAK={number('SOAK')}: a guest runs for a week at most: set it to "
                          f"{WEEK // 2} or less")
        return Settings(bool(number("SAN")), number("SOAK"), number("READS", READS),
                        number("SEED", 1), os.environ.get("ONLY") or "*",
                        os.environ.get("REPLAY") or "", pages)


@dataclass(frozen=True)
class Job:
    """One boot in each of its vehicles: the script, and the disks and the truth it finds there."""
    name: str
    script: str = "true"
    vehicles: tuple[str, ...] = ("uml",)
    disks: tuple[Path, ...] = ()
    truth: Path | None = None
    args: tuple[str, ...] = ()
    since: tuple[int, ...] = ()  # the first kernel that can
    skip: str = ""  # why none can
    seconds: int = 0  # that it takes by itself


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

    def __init__(self, tests: list[Test], variant: str, guest_name: str) -> None:
        self.tests = tests
        self.variant = variant
        self.guest_name = guest_name
        self.frames: list[Frame] = []
        self.since = time.monotonic()

    def add(self, name: str, result: str, reason: str = "") -> None:
        now = time.monotonic()
        suites = [frame.name for frame in self.frames if frame.name] or [self.guest_name]
        path = ".".join([self.variant, *suites, name])
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
            if inner is not None and verdict == "passed":
                verdict, reason = "failed", "it has no results"
            self.add(match[3], verdict, reason)
        elif bool(match[1]) != bool(inner.bad):
            self.add(match[3], "failed", "the suite and its tests disagree")
        frame.notes.clear()

    def end(self) -> None:
        while self.frames:
            self.close()


def guest(built: Kernel, job: Job, tools: list[Path], slot: int) -> list[Test]:
    """One boot; whatever ends it early is a failed test, and the others still run."""
    tests: list[Test] = []
    reason = job.skip
    if job.since > (version := tuple(map(int, re.findall(r"\d+", built.version)[:2]))):
        reason = f"Linux {'.'.join(map(str, version))} is older than " \
            f"{'.'.join(map(str, job.since))}"
    if reason:
        return [Test(f"{built.variant}.{job.name}", "skipped", 0, reason)]
    ktap, start = Ktap(tests, built.variant, job.name), time.monotonic()
    # a page of vmap() is a mapping of the host, of which a process may have 65530, and is kept
    # until a worker has time: without lazy freeing a busy guest does not run out of them
    args = [*job.args, *(["debug_pagealloc=on"] if built.vehicle == "uml" else [])]
    try:
        vehicle.boot(built, programs=tools, script=job.script, disks=list(job.disks),
                     truth=job.truth, args=args, slot=slot,
                     timeout=TIMEOUT[built.vehicle]
                     * (SLOWER if "san" in built.variant.split("-") else 1) + job.seconds,
                     on_line=lambda line, _: ktap.line(line))
    except (Failure, OSError) as failure:
        ktap.frames.clear()
        ktap.since = start
        ktap.add("guest", "failed", str(failure))
    ktap.end()
    if not tests:
        ktap.add("results", "failed", "the guest printed none")
    passed = sum(test.result == "passed" for test in tests)
    say(f"{built.variant}.{job.name}: {passed} of {len(tests)} passed, "
        f"{time.monotonic() - start:.1f} s")
    return tests


def oracle(tools: list[Path], name: str, image: Image) -> list[Test]:
    """No kernel: what fails here is the image, its data or the oracle."""
    tests: list[Test] = []
    ktap = Ktap(tests, "host", name)
    [program] = [tool for tool in tools if tool.name == "erofs_oracle"]
    with subprocess.Popen([program, "--image", image.path, "--truth", image.data.truth,
                           "--name", name, *(f"--device={path}" for path in image.devices)],
                          stdout=subprocess.PIPE, text=True, errors="replace") as process:
        for line in process.stdout or ():
            ktap.line(line.rstrip("\n"))
    ktap.end()
    if not tests or process.returncode < 0:
        ktap.add("oracle", "failed", f"erofs_oracle ended with status {process.returncode}")
    return tests


def mount(image: Image) -> str:
    devices = "".join(f",device=$DISK_{chr(66 + i)}" for i in range(len(image.devices)))
    return f"mount -t erofs -o ro{devices} $DISK_A /mnt\n"


def replay(settings: Settings) -> str:
    return f"--replay {shlex.quote(settings.replay)}" if settings.replay else ""


def dio_read(settings: Settings, image: Image, options: str) -> str:
    return (f"dio_read {options} {replay(settings)} --seed {settings.seed} --name {image.name} "
            f"--mount /mnt --truth /truth {FAILED}")


def dio_exercise(settings: Settings, image: Image, options: str) -> str:
    """More of everything that dio_read does; what is in the image is the truth."""
    work = f"--seconds {settings.soak}" if settings.soak else f"--reads {settings.reads}"
    devices = " ".join(f"--device $DISK_{chr(65 + i)}" for i in range(1 + len(image.devices)))
    return (f"dio_exercise {options} {replay(settings)} {work} --seed {settings.seed} "
            f"--name {image.name}-exercise --mount /mnt {devices} {FAILED}")


def images_of(settings: Settings, vehicle_name: str) -> list[tuple[Image, tuple[int, int]]]:
    """Emulation and sanitizers are slow: a sixth of the data is for them."""
    if vehicle_name == "qemu":
        return check_images(ON_QEMU, 6)
    return check_images(tuple(FEATURES), 6 if settings.san or vehicle_name == "arm64" else 1) \
        + forged_images(settings.page)


def damage_job(settings: Settings, name: str, image: Image, since: tuple[int, ...]) -> Job:
    return Job(image.name, mount(image) + dio_read(settings, image, "--damaged"),
               vehicles=(name,), disks=(image.path,),
               truth=image.data.truth, since=since)


def image_jobs(settings: Settings, name: str) -> Iterator[Job]:
    for image, since in images_of(settings, name):
        if image.damaged:
            yield damage_job(settings, name, image, since)
            continue
        # a call that dio_exercise printed begins with API@MEMORY;
        exercise = not settings.replay or ";" in settings.replay
        yield Job(image.name, "mke2fs /dev/ram0 8192 > /dev/null\nmkdir /tmp/ext2\n"
                  "mount -t ext2 /dev/ram0 /tmp/ext2\n" + mount(image)
                  + (dio_read(settings, image, "--private /tmp/ext2")
                     if ";" not in settings.replay else "")
                  + (SWAP + dio_exercise(settings, image, "--private /tmp/ext2")
                     if exercise else ""),
                  vehicles=(name,), disks=(image.path, *image.devices), truth=image.data.truth,
                  since=since, seconds=settings.seconds, skip=image.unmountable)
        if image.name in DAMAGED and not settings.replay:
            yield damage_job(settings, name, damage(image), since)


def caller_job() -> Job:
    image = caller_image()
    return Job(image.name, "mke2fs -b 4096 /dev/ram0 131072 > /dev/null\nmkdir /tmp/ext2\n"
               "mount -t ext2 /dev/ram0 /tmp/ext2\n"
               "mkswap /dev/ram1 > /dev/null\nswapon /dev/ram1\n"
               "dio_callers --device $DISK_A --mount /mnt --truth /truth --scratch /tmp/ext2 "
               f"--name {image.name} {FAILED}",
               vehicles=BOTH, disks=(image.path,), truth=image.data.truth)


def device_job() -> Job:
    """The second image is tried in a file, the others have devices of their own."""
    known = {image.name: image for image, _ in forged_images()}
    plain, small, spread, fine, far = (known[name] for name in (
        "plain-4096", "plain-1024", "devices", "plain-devices", "far"))
    return Job("block-devices", "mke2fs -b 4096 /dev/ram0 16384 > /dev/null\nmkdir /tmp/ext2\n"
               "mount -t ext2 /dev/ram0 /tmp/ext2\n"
               "cat $DISK_A > /tmp/ext2/plain\ncat $DISK_B > /tmp/ext2/small\n"
               "umount /tmp/ext2\n"
               "dio_devices --plain $DISK_A --spread $DISK_C --extra $DISK_D $DISK_E "
               "--fine $DISK_F --fine-extra $DISK_G --far $DISK_H --far-extra $DISK_I "
               f"--scratch /dev/ram0 --mount /mnt --name block-devices {FAILED}", vehicles=BOTH,
               disks=(plain.path, small.path, spread.path, *spread.devices, fine.path,
                      *fine.devices, far.path, *far.devices), since=(6, 15))


def console_job(settings: Settings) -> Job:
    """Of this program rather than of the kernel: a result in which a message comes is one."""
    return Job("console", "printf 'KTAP ver'\necho something else > /dev/kmsg\n"
               "printf 'sion 1\\n1..1\\no'\necho and more > /dev/kmsg\n"
               "echo 'k 1 - cut_in_two'\n", vehicles=settings.vehicles)


def all_jobs(settings: Settings) -> list[Job]:
    """What make check does: add to this list."""
    jobs = [job for name in settings.vehicles for job in image_jobs(settings, name)]
    if not settings.replay:
        if settings.vehicles == BOTH:
            jobs += [caller_job(), device_job()]
        jobs.append(console_job(settings))
        jobs.append(Job("kunit", vehicles=settings.vehicles,
                        args=("kunit.enable=1", "kunit.filter_glob=erofs*")))
    return jobs


def host_tests(settings: Settings, tools: list[Path]) -> list[Test]:
    if settings.replay:
        return []
    images: dict[str, Image] = {}
    # those of the same name for vehicles that are slow are smaller ones
    for vehicle_name, more in zip(reversed(settings.vehicles), ("", "-small")):
        for image, _ in images_of(settings, vehicle_name):
            if fnmatch.fnmatch(image.name, settings.only) and not image.damaged:
                images[image.name + more] = image
    with step("reading the images without a kernel"), ThreadPoolExecutor(int(JOBS)) as pool:
        return [test for tests in pool.map(partial(oracle, tools), images, images.values())
                for test in tests]


def chosen(settings: Settings) -> list[tuple[str, Job]]:
    """Vehicles and jobs, the slow ones first: what begins last should not end last."""
    jobs = all_jobs(settings)
    every = [(name, job) for name in settings.vehicles for job in jobs if name in job.vehicles]
    some = [(name, job) for name, job in every
            if fnmatch.fnmatch(job.name, settings.only)
            or fnmatch.fnmatch(f"{name}.{job.name}", settings.only)]
    if not some:
        names = ", ".join(f"{name}.{job.name}" for name, job in every)
        raise Failure(f"ONLY={settings.only} matches none of {names}")
    return some


def places() -> int:
    """How many guests may run at a time."""
    free = re.search(r"^MemAvailable: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.M)
    return max(1, min(len(vehicle.CPUS), int(free[1]) * 1024 // MEMORY if free else 1))


def all_tests(settings: Settings, tests: list[Test]) -> Kernel:
    """Adds to the tests as they come: those of a run that is ended tell something, too."""
    apt.ensure(*(apt.ARM64 if "arm64" in settings.vehicles else ()))
    plan = chosen(settings)
    tests += host_tests(settings, programs())
    names = sorted({name for name, _ in plan}, reverse=True)
    tools = {name: programs(name) for name in names}
    built = {name: kernel(name + settings.variant) for name in names}
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(count := places()):
        slots.put(slot)

    def one(name: str, job: Job) -> list[Test]:
        slot = slots.get()
        try:
            return guest(built[name], job, tools[name], slot)
        finally:
            slots.put(slot)

    first = next(iter(built.values()))
    with step(f"testing Linux {first.version}, seed {settings.seed}"), \
            ThreadPoolExecutor(count) as pool:
        try:
            waiting = [pool.submit(one, name, job) for name, job in plan]
            for future in as_completed(waiting):
                tests += future.result()
        except BaseException:
            vehicle.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return first


def counts(tests: list[Test]) -> dict[str, int]:
    return {result: sum(test.result == result for test in tests)
            for result in ("passed", "failed", "skipped")}


def summary(tests: list[Test]) -> str:
    return ", ".join(f"{count} {result}" for result, count in counts(tests).items())


def skips(tests: list[Test]) -> Iterator[str]:
    """A line for each test and reason, or the few that matter would drown in the others."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for test in tests:
        if test.result == "skipped":
            vehicle_name, image, *rest = test.name.split(".")
            groups.setdefault((vehicle_name, ".".join(rest), test.reason), []).append(image)
    for (vehicle_name, test_name, reason), images in groups.items():
        more = f" and {len(images) - 2} more" if len(images) > 2 else ""
        where = test_name or "all tests"
        yield (f"skipped {len(images)}: {vehicle_name}: {where}: {reason}: "
               f"{', '.join(images[:2])}{more}")


def report(settings: Settings, built: Kernel | None, tests: list[Test]) -> None:
    vehicles: dict[str, list[Test]] = {}
    for test in tests:
        vehicles.setdefault(test.name.partition(".")[0], []).append(test)
    (out := REPO / "out").mkdir(exist_ok=True)
    rows = [{key: value for key, value in asdict(test).items() if key != "reason" or value}
            for test in tests]
    write(out / "check.json", json.dumps(
        {**counts(tests), "kernel": built and built.version, "base": built and built.base,
         "settings": asdict(settings),
         "vehicles": {name: counts(some) for name, some in vehicles.items()}, "tests": rows},
        indent=1) + "\n")
    print("".join(f"{line}\n" for line in skips(tests)), end="")
    for test in tests:  # behind the skips: the end is what is read, and all that some logs keep
        if test.result == "failed":
            print(f"failed: {test.name}: {test.reason}")
    for name, some in vehicles.items():
        print(f"{name}: {summary(some)}")
    print(summary(tests), flush=True)


def check() -> None:
    settings = Settings.read()
    tests: list[Test] = []
    built: Kernel | None = None
    try:
        built = all_tests(settings, tests)
    except BaseException as reason:
        if tests:
            tests.append(Test("run.end", "failed", 0, f"not all was tested: {reason}"))
            report(settings, built, tests)
        raise
    report(settings, built, tests)
    if counts(tests)["failed"] or not counts(tests)["passed"]:
        sys.exit(1)


if __name__ == "__main__":
    main(check)
