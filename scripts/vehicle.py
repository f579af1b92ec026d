#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Boots User Mode Linux and runs a shell script in it."""
import contextlib
import os
import re
import resource
import secrets
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import apt
from ui import FULL, REPO, Failure, cache_dir, run, say

# only lines of the kernel log count: what a test program prints is its own business
BAD = re.compile(r"\[ *\d+\.\d{6}\].*(Kernel panic|BUG:|WARNING:|Oops|KASAN|UBSAN|KMSAN|KCSAN"
                 r"|possible circular locking|possible recursive locking|inconsistent lock state"
                 r"|suspicious RCU usage|sleeping function called|blocked for more than"
                 r"|general protection fault|kmemleak: \d+ new)")
BUSYBOX = Path("/bin/busybox")

_session = 0
_seen: dict[tuple[int, int], int] = {}


def _pids() -> Iterator[int]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int(path.joinpath("stat").read_text().rpartition(")")[2].split()[3]) == _session:
                yield int(path.name)
        except OSError:
            pass


def cpu_seconds() -> float:
    """User and system time of the guest so far; what ended counts as far as it was last seen."""
    for pid in _pids():
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            try:
                _seen[pid, int(path.parent.name)] = int(path.read_text().split()[0])
            except OSError:
                pass
    return sum(_seen.values()) / 1e9


def _initramfs(work: Path, programs: list[Path], script: str) -> Path:
    root = work / "root"
    for name in ("bin", "proc", "sys", "dev", "tmp", "host", "mnt"):
        (root / name).mkdir(parents=True)
    for program in (BUSYBOX, *programs):
        shutil.copy(program, root / "bin")
    for name in subprocess.check_output([BUSYBOX, "--list"], text=True).split():
        if not (root / "bin" / name).exists():
            (root / "bin" / name).symlink_to("busybox")
    shutil.copy(REPO / "scripts/guest-init", root / "init")
    (root / "init").chmod(0o755)
    (root / "job").write_text(script)
    run(["sh", "-c", "find . | cpio --quiet -o -H newc > ../initramfs"], what="initramfs", cwd=root)
    return work / "initramfs"


def _memory_dir(mem: str) -> str:
    """UML keeps guest memory in a file: one on a tmpfs spares the disk."""
    size = int(mem[:-1]) << {"K": 10, "M": 20, "G": 30}[mem[-1]]
    for place in ("/dev/shm", str(cache_dir())):
        if os.access(place, os.W_OK) and shutil.disk_usage(place).free > size:
            return place
    raise Failure(FULL)


def _pin() -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _console(guest: subprocess.Popen[bytes], lines: list[str], timeout: float,
             on_line: Callable[[str], str | None]) -> str:
    """Follow the console to its end; the reason to stop earlier, if there is one."""
    assert guest.stdin and guest.stdout
    end, rest = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as ready:
        ready.register(guest.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(max(0, end - time.monotonic())):
                return f"hangs: no end after {timeout:.0f} s"
            data = os.read(guest.stdout.fileno(), 65536)
            *whole, rest = (rest + data).split(b"\n")
            for raw in whole if data else [rest]:
                line = raw.decode(errors="replace").rstrip("\r")
                lines.append(line)
                if answer := on_line(line):
                    with contextlib.suppress(BrokenPipeError):  # the status tells why it ended
                        guest.stdin.write(answer.encode() + b"\n")
                        guest.stdin.flush()
            if not data:
                return ""


def boot(linux: Path, *, programs: list[Path], script: str, disks: list[Path] = [],
         mem: str = "1536M", args: list[str] = [], timeout: float,
         on_line: Callable[[str], str | None] | None = None) -> list[str]:
    """Run script in a guest and return its console; anything but a clean success is a Failure."""
    global _session
    apt.ensure()
    token = f"done-{secrets.token_hex(16)}"
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="boot-", dir=cache_dir()) as name:
        work = Path(name)
        initramfs = _initramfs(work, programs, script)
        cmd = [str(linux), f"mem={mem}", f"initrd={initramfs}", "con=null", "con0=fd:0,fd:1",
               "ssl=null", "panic_on_warn=1", f"token={token}", f"uml_dir={work}",
               *(f"ubd{chr(97 + i)}r={disk}" for i, disk in enumerate(disks)),
               # a system call costs a third with it; older kernels do not know it
               *(["seccomp=on"] if b"seccomp=" in linux.read_bytes() else []), *args]
        guest = subprocess.Popen(cmd, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_pin,
                                 env={**os.environ, "TMPDIR": _memory_dir(mem)})
        _session = guest.pid
        _seen.clear()
        try:
            why = _console(guest, lines, timeout, on_line or (lambda line: None))
        finally:
            while pids := list(_pids()):
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                guest.poll()
            guest.wait()
    bad = next((line for line in lines if BAD.search(line)), None)
    why = f"reports: {bad.strip()}" if bad else why
    if not why and not any(line.endswith(token) for line in lines):
        why = f"ended without success (status {guest.returncode})"
    if why:
        for line in lines[-40:]:
            say(f"  | {line}")
        raise Failure(f"the guest {why}")
    return lines
