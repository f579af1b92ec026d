#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Boots a kernel, in User Mode Linux or QEMU, and runs a shell script in it."""
import contextlib
import json
import os
import re
import resource
import secrets
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apt
from images import pack
from kernel import Kernel
from ui import FULL, REPO, Cut, Failure, cache_dir, output, run, say

# only lines of the kernel log count: what a test program prints is its own business
BAD = re.compile(r"\[ *\d+\.\d{6}\].*(Kernel panic|BUG:|WARNING:|Oops|KASAN|UBSAN|KMSAN|KCSAN"
                 r"|possible circular locking|possible recursive locking|inconsistent lock state"
                 r"|suspicious RCU usage|sleeping function called|trying to register non-static"
                 r"|self-detected stall|detected stalls on"
                 r"|general protection fault|pagealloc: |kmemleak: \d+ new)")
# a message of the kernel may come in the middle of a line of the job, which goes on behind it; no
# job prints anything like the start of one
MESSAGE = re.compile(r"(.*?)(\[ *\d+\.\d{6}\] .*)")
BUSYBOX = Path("/bin/busybox")
CPUS = sorted(os.sched_getaffinity(0))


class Guest:
    """A running guest: its console, its CPU time, and the end of all of its processes."""
    running: set["Guest"] = set()
    lock = threading.Lock()
    stopped = False

    def __init__(self, cmd: list[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.seen: dict[tuple[int, int], int] = {}
        with Guest.lock:
            if Guest.stopped:
                raise Failure("stopped")
            try:
                self.process = subprocess.Popen(
                    cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    start_new_session=True, env={**os.environ, **env})
            except FileNotFoundError as missing:
                raise Failure(f"no {missing.filename} on this machine: install it") from None
            Guest.running.add(self)

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.process.wait()
        with Guest.lock:
            Guest.running.discard(self)

    def kill(self) -> None:
        while pids := list(self._pids()):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.poll()

    def _pids(self) -> Iterator[int]:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                fields = path.joinpath("stat").read_text().rpartition(")")[2].split()
                # where nobody reaps orphans they stay, dead as they are
                if int(fields[3]) == self.process.pid and fields[0] != "Z":
                    yield int(path.name)
            except OSError:
                pass

    def cpu_seconds(self) -> float:
        """User and system time so far; what ended counts as far as it was last seen."""
        for pid in self._pids():
            for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
                try:
                    self.seen[pid, int(path.parent.name)] = int(path.read_text().split()[0])
                except OSError:
                    pass
        return sum(self.seen.values()) / 1e9

    def follow(self, timeout: float, on_line: "OnLine") -> str:
        """Follow the console to its end; the reason to stop earlier, if there is one."""
        assert self.process.stdin and self.process.stdout
        end, rest, cut = time.monotonic() + timeout, b"", ""
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while True:
                # who prints without end is always ready
                left = end - time.monotonic()
                if left <= 0 or not ready.select(left):
                    return f"hangs: no end after {timeout:.0f} s"
                data = os.read(self.process.stdout.fileno(), 65536)
                *whole, rest = (rest + data).split(b"\n")
                for raw in whole if data else [rest]:
                    line = raw.decode(errors="replace").rstrip("\r")
                    if message := MESSAGE.fullmatch(line):
                        cut, line = cut + message[1], message[2]
                    else:
                        cut, line = "", cut + line
                    self.lines.append(line)
                    if answer := on_line(line, self):
                        with contextlib.suppress(BrokenPipeError):  # the status tells why it ended
                            self.process.stdin.write(answer.encode() + b"\n")
                            self.process.stdin.flush()
                if not data:
                    return ""


OnLine = Callable[[str, Guest], str | None]


def result(line: str) -> dict[str, Any] | None:
    """What a program in the guest has printed for a script, if the line is that."""
    if not line.startswith("@json "):
        return None
    try:
        return json.loads(line.removeprefix("@json "))
    except json.JSONDecodeError:
        raise Failure(f"the guest ended in the middle of a result: {line}") from None


def stop() -> None:
    """End all guests, those of other threads too, and start no new one."""
    with Guest.lock:
        Guest.stopped = True
        guests = list(Guest.running)
    for guest in guests:
        guest.kill()


@dataclass(frozen=True)
class Machine:
    """What QEMU shows to the guest; packages come from elsewhere if it is not the host's kind."""
    args: tuple[str, ...]
    console: str


MACHINES = {
    "qemu": Machine(("qemu-system-x86_64", "-M", "q35"), "ttyS0"),
    "arm64": Machine(("qemu-system-aarch64", "-M", "virt", "-cpu", "cortex-a76"), "ttyAMA0"),
}


def _busybox(built: Kernel) -> Path:
    if built.vehicle != "arm64":
        return BUSYBOX
    return apt.foreign("arm64", "busybox-static") / "bin/busybox"


def _initramfs(work: Path, busybox: Path, programs: list[Path], script: str) -> None:
    root = work / "root"
    for name in ("bin", "proc", "sys", "dev", "tmp", "host", "truth", "mnt"):
        (root / name).mkdir(parents=True)
    for program in (busybox, *programs):
        shutil.copy(program, root / "bin")
    for name in output([str(BUSYBOX), "--list"]).split():
        if not (root / "bin" / name).exists():
            (root / "bin" / name).symlink_to("busybox")
    shutil.copy(REPO / "scripts/guest-init", root / "init")
    (root / "init").chmod(0o755)
    (root / "job").write_text(script)
    run(["sh", "-c", "find . | cpio --quiet -o -H newc > ../initramfs"], what="initramfs", cwd=root)


def _memory_dir(mem: str) -> str:
    """UML keeps guest memory in a file: one on a tmpfs spares the disk."""
    # as much as guests on all CPUs may come to use, which they don't do at once
    size = len(CPUS) * int(mem[:-1]) << {"K": 10, "M": 20, "G": 30}[mem[-1]]
    for place in ("/dev/shm", str(cache_dir())):
        # it is executed, too
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free > size \
                and not os.statvfs(place).f_flag & os.ST_NOEXEC:
            return place
    raise Cut(FULL)


def _uml(linux: Path, work: Path, disks: list[Path], mem: str, slot: int) -> list[str]:
    return ["taskset", "-c", str(CPUS[-1 - slot % len(CPUS)]), str(linux), f"mem={mem}",
            f"initrd={work / 'initramfs'}", "con=null", "con0=fd:0,fd:1", "ssl=null",
            f"uml_dir={work}", *(f"ubd{chr(97 + i)}r={disk}" for i, disk in enumerate(disks)),
            # a system call costs a third with it; older kernels do not know it
            *(["seccomp=on"] if b"seccomp=" in linux.read_bytes() else [])]


def _qemu(built: Kernel, work: Path, disks: list[Path], mem: str, cpus: int, vm: list[str],
          append: list[str]) -> list[str]:
    # nobody writes to them, and other guests may read the same ones
    drives = ["if=virtio,format=raw,readonly=on,file.locking=off,"
              f"file={str(disk).replace(',', ',,')}" for disk in disks]
    machine = MACHINES[built.vehicle]
    return [*machine.args, "-accel", f"tcg,thread={'multi' if cpus > 1 else 'single'}",
            "-smp", str(cpus), "-m", mem, "-nodefaults", "-no-user-config", "-display", "none",
            "-serial", "stdio", "-no-reboot", *vm,
            "-kernel", str(built.linux), "-initrd", str(work / "initramfs"),
            *(word for drive in drives for word in ("-drive", drive)),
            "-append", " ".join([f"console={machine.console}", "panic=-1", *append])]


def boot(built: Kernel, *, programs: list[Path], script: str, disks: list[Path] = [],
         truth: Path | None = None, mem: str = "1536M", args: list[str] = [], timeout: float,
         slot: int = 0, cpus: int = 2, vm: list[str] = [],
         on_line: OnLine = lambda line, guest: None) -> list[str]:
    """Run script in a guest and return its console; anything but a clean success is a Failure.

    The script finds the disks as $DISK_A, $DISK_B... and the directory truth as /truth. User Mode
    Linux has one CPU; options of QEMU, as which vm is taken, mean nothing to it.
    """
    apt.ensure()
    token = f"done-{secrets.token_hex(16)}"
    args = ["panic_on_warn=1", f"token={token}", *args]
    if "san" in built.variant.split("-"):
        # KASAN does not see what a device writes into pages that are free, and stale pointers in
        # the caches of the slab allocator hide from kmemleak what is leaked less than 1000 times
        args += ["kasan_multi_shot", "page_poison=1", "slab_debug=F"]
    with tempfile.TemporaryDirectory(prefix="boot-", dir=cache_dir()) as name:
        work = Path(name)
        device = "ubd" if built.vehicle == "uml" else "vd"
        setup = [f"export DISK_{chr(65 + i)}=/dev/{device}{chr(97 + i)}" for i in range(len(disks))]
        if built.vehicle == "uml":
            setup.append("mount -t hostfs -o ro none /host")
            setup += [f"mount --bind {shlex.quote(f'/host{truth}')} /truth"] if truth else []
            cmd = [*_uml(built.linux, work, disks, mem, slot), *args]
        else:
            setup += [f"mount -t erofs -o ro /dev/vd{chr(97 + len(disks))} /truth"] if truth else []
            disks = [*disks, *([pack(truth)] if truth else [])]
            cmd = _qemu(built, work, disks, mem, cpus, vm, args)
        _initramfs(work, _busybox(built), programs, "\n".join([*setup, script]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with Guest(cmd, {"TMPDIR": _memory_dir(mem)}) as guest:
            why = guest.follow(timeout, on_line)
    return _verdict(guest, token, why)


def _verdict(guest: Guest, token: str, why: str) -> list[str]:
    lines = guest.lines
    if Guest.stopped:
        raise Failure("the guest was stopped")
    first = next((number for number, line in enumerate(lines)
                  if BAD.search(line)), None)
    if first is not None:
        why = f"reports: {lines[first].strip()}"
    # the kernel may print its command line, which ends with the token as well
    elif not why and not any(line.endswith(token) and not line.endswith(f"={token}")
                             for line in lines):
        why = f"ended without success (status {guest.process.returncode})"
    if not why:
        return lines
    shown = lines[-40:] if first is None else lines[max(0, first - 5):first + 55]
    say("\n".join(f"  | {line}" for line in shown))
    raise Failure(f"the guest {why}")
