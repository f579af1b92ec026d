#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""What every script needs: errors, progress, commands with a log, cache entries."""
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
JOBS = os.environ.get("JOBS") or str(len(os.sched_getaffinity(0)))
# numbers that the user may set, and their least values
NUMBERS = {"JOBS": 1, "SAN": 0, "SOAK": 0, "READS": 0, "SEED": 0, "FULL": 0, "ROUNDS": 1}
# what commands get of the environment: flags and the like would go into what is built and kept
PASSED = re.compile(r"PATH|HOME|USER|LOGNAME|TMPDIR|SSL_CERT_\w+|(?i:[a-z]+_proxy)")
WEEK = 7 * 24 * 3600
FULL = "disk full: free space or set CACHE= to a directory with room"


class Failure(Exception):
    """Something the user can act on; its text is the whole message."""


class Cut(Failure):
    """What was being written may be incomplete, and look as if it were not."""


def number(name: str, default: int = 0) -> int:
    """What the user has set."""
    least = NUMBERS[name]
    text = os.environ.get(name) or str(max(default, least))
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise Failure(f"{name}={text}: set it to a number from {least} to 999999999")
    return int(text)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")  # at once, or threads would mix their lines
    sys.stderr.flush()


def main(fn: Callable[[], Any]) -> None:
    # SystemExit unwinds the stack, so that children are ended and half-made entries removed
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda n, _: sys.exit(128 + n))
    try:
        for name in NUMBERS:  # all of them: a wrong one is not found out after an hour
            number(name)
        fn()
    except KeyboardInterrupt:
        sys.exit(130)
    except Failure as failure:
        sys.exit(f"error: {failure}")
    except OSError as failure:
        if failure.errno in (errno.ENOSPC, errno.EDQUOT):
            sys.exit(f"error: {FULL}")
        if failure.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            sys.exit(f"error: {failure.filename}: {failure.strerror}: "
                     "set CACHE= to a directory you own, or give yourself access")
        raise


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    say(f"== {text}")
    start = time.monotonic()
    yield
    say(f"== {text}: {time.monotonic() - start:.1f} s")


def bar(total: int | None, text: str, unit: str = "it", show: bool = True) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:  # the step that installs it runs without one
        return contextlib.nullcontext()
    hide = not (show and sys.stderr.isatty())
    return tqdm(total=total, desc=text, unit=unit, unit_scale=unit != "it", leave=False,
                disable=hide)


@contextlib.contextmanager
def growing(top: Path, total: int, text: str) -> Iterator[None]:
    """A bar for a command that fills the directory top with total bytes."""
    done = threading.Event()
    with bar(total, text, "B") as progress:
        def look() -> None:
            while not done.wait(0.2):
                size = sum(path.stat().st_size for path in top.glob("*") if path.is_file())
                progress.update(size - progress.n)

        watcher = threading.Thread(target=look, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def run(cmd: list[str], *, what: str, cwd: Path | None = None, env: dict[str, str] | None = None,
        total: int | None = None, log: Path | None = None, quiet: bool = False) -> None:
    """Run cmd with its output in a log; lines of output are the progress."""
    log = log or cache_dir() / "log" / (re.sub(r"\W+", "-", what) + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=20)
    clean = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key)}
    try:
        process = subprocess.Popen(cmd, cwd=cwd, env={**clean, "LC_ALL": "C", **(env or {})},
                                   stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace",
                                   start_new_session=True)
    except FileNotFoundError as missing:
        raise Failure(f"{what}: no {missing.filename} on this machine: install it") from None
    try:
        with log.open("w") as file, bar(total, what, show=total is not None) as progress:
            assert process.stdout
            for line in process.stdout:
                file.write(line)
                tail.append(line)
                if progress is not None:
                    progress.update()
        status = process.wait()
    finally:
        if process.poll() is None:
            end(process, what)
    if status:
        if "No space left on device" in "".join(tail) or disk_full():
            raise Cut(FULL)
        sys.stderr.write("" if quiet else "".join(tail))
        raise Failure(f"{what}: {Path(cmd[0]).name} ended with status {status}: see {log}")


def end(process: subprocess.Popen[str], what: str) -> None:
    os.killpg(process.pid, signal.SIGTERM)  # make then removes what it was writing
    try:
        process.wait(10)
    except BaseException as reason:  # Ctrl-C again is one
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise Cut(f"{what}: killed") from reason


def output(cmd: list[str], check: bool = True) -> str:
    """Standard output of a short command; without check, whether or not it succeeds."""
    try:
        done = subprocess.run(cmd, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise Failure(f"no {cmd[0]} on this machine: install it") from None
    if check and done.returncode:
        raise Failure(f"{' '.join(cmd)} ended with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def git_files(top: Path) -> list[str]:
    """Names below top, without what git ignores; none if it is in no checkout."""
    if not any((parent / ".git").exists() for parent in (top, *top.parents)):
        return []
    # a checkout of another user is one, too
    names = output(["git", "-C", str(top), "-c", "safe.directory=*", "ls-files", "-coz",
                    "--exclude-standard"])
    # neither what has been removed, nor checkouts inside
    return [name for name in names.split("\0")
            if name and ((top / name).is_symlink() or (top / name).is_file())]


def repository(top: Path) -> list[Path]:
    """Files below top, without what git ignores; all of them where there is no git."""
    paths = [top / name for name in git_files(top)] or sorted(top.rglob("*"))
    return [path for path in paths if path.is_file()]


def write(path: Path, text: str) -> None:
    """Complete or not at all, also on a full disk, or if another run does the same."""
    new = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    new.write_text(text)
    new.rename(path)


def disk_full() -> bool:
    return shutil.disk_usage(cache_dir()).free < 4 << 20


def cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("CACHE") or Path(base) / "erofs-dio").absolute()
    if re.search(r"[\s:,'\"]", str(path)):
        raise Failure(f"CACHE={path}: no kernel can be built and booted in a directory with "
                      "spaces, colons, commas or quotes in its name: set CACHE= to another one")
    path.mkdir(parents=True, exist_ok=True)
    return path


def digest(*parts: str | bytes | Path) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        data = data.encode() if isinstance(data, str) else data
        total.update(b"%d:" % len(data) + data)
    return total.hexdigest()[:20]


def walk(top: str, skip: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    with os.scandir(top) as entries:
        for item in entries:
            if item.name not in skip:
                if item.is_dir(follow_symlinks=False):
                    yield from walk(item.path, skip)
                else:
                    yield item


def state(top: Path, skip: tuple[str, ...] = ()) -> str:
    """Names, sizes and times of all files: hashing a kernel tree would take too long."""
    rows = []
    for item in walk(str(top), skip):
        info = item.stat(follow_symlinks=False)
        rows.append(f"{item.path[len(str(top)):]}\0{info.st_size}\0{info.st_mtime_ns}")
    return digest("\n".join(sorted(rows)))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another run that uses {path}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def entry(kind: str, key: str, make: Callable[[Path], None],
          check: Callable[[Path], bool] | None = None) -> Path:
    """CACHE/kind/key, made by make(directory) unless it is there and nobody touched it since."""
    final = cache_dir() / kind / key
    work, seal = final.with_name(f".{key}.new"), final.with_name(f".{key}.seal")

    def good() -> bool:
        return (final.is_dir() and seal.is_file() and seal.read_text() == state(final)
                and (check is None or check(final)))

    with locked(final.with_name(f".{key}.lock")):
        if good():
            return final
        if final.exists():
            say(f"{final} is damaged or out of date: making it again")
        for old in (final, work):
            shutil.rmtree(old, ignore_errors=True)
        seal.unlink(missing_ok=True)
        work.mkdir()
        try:
            make(work)
            seal.write_text(state(work))
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return final
