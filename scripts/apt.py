#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""Debian packages: installed ones, and newer ones without touching the system's own sources."""
import functools
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

from ui import (Cut, Failure, cache_dir, digest, entry, growing, locked, output, run, say, step,
                write)

# what becomes a part of programs that are built
LINKED = ("libc6-dev", "liblz4-dev", "liblzma-dev", "libdeflate-dev", "zlib1g-dev", "libzstd-dev",
          "uuid-dev", "libcli11-dev", "libxxhash-dev", "nlohmann-json3-dev", "liburing-dev",
          "libaio-dev")
# one list, so that a user without root rights hears once what is missing
TOOLS = ("python3-tqdm", "gcc", "g++", "make", "bc", "bison", "flex", "libelf-dev", "patch", "cpio",
         "xz-utils", "busybox-static", "dpkg-dev", "autoconf", "automake", "libtool", "pkg-config",
         "git", "python3-xxhash", "qemu-system-x86", *LINKED)
ARM64 = ("gcc-aarch64-linux-gnu", "g++-aarch64-linux-gnu", "libc6-dev-arm64-cross",
         "qemu-system-arm")


class Gone(Failure):
    """The mirror answers, but has no fitting version."""


KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
DAY = 24 * 3600


def ensure(*packages: str) -> None:
    wanted = sorted({*TOOLS, *packages})
    rows = output(["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted],
                  check=False)
    there = {row.split()[0] for row in rows.splitlines() if row.endswith(" installed")}
    missing = [package for package in wanted if package not in there]
    if not missing:
        return
    install = "apt-get -y -o DPkg::Lock::Timeout=600 --no-install-recommends install " \
        + " ".join(missing)
    script = f"export DEBIAN_FRONTEND=noninteractive; {install} || (apt-get update && {install})"
    with step(f"installing {' '.join(missing)}"):
        if not os.geteuid():
            run(["sh", "-c", script], what="apt-get install")
        # may ask for a password; all but this is done, and owned, by the user
        elif not shutil.which("sudo") or subprocess.call(["sudo", "sh", "-c", script]):
            raise Failure(f"packages are missing: run as root: {install}")


@functools.cache
def linked(compiler: str = "gcc") -> str:
    """What else programs are made from, beside their sources."""
    return output([compiler, "--version"]) + output(["dpkg-query", "-W", *LINKED])


@functools.cache
def targets() -> list[list[str]]:
    """Suite, component and URI of all that the machine's own sources serve, Debian's first."""
    rows = output(["apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)",
                   "Identifier: Packages"])
    return sorted(map(str.split, rows.splitlines()), key=lambda row: "debian" not in row[2])


@functools.cache
def acquire() -> str:
    """Proxies and the like are the user's; hooks and pins are not ours to run."""
    return "".join(re.findall(r"^Acquire::.*\n", output(["apt-config", "dump"]), re.M))


def uri(suite: str) -> str:
    """The machine's own URI for a suite; a suite it does not list is where its release is."""
    release = dict(re.findall(r'^(\w+)="?(.*?)"?$', Path("/etc/os-release").read_text(), re.M))
    for name in (suite, release.get("VERSION_CODENAME")):
        for row in targets():
            if row[:2] == [name, "main"]:
                return row[2]
    raise Failure("no apt source of this machine serves the Debian archive: add its main component")


def config(suite: str, kind: str) -> Path:
    """A private apt configuration for one suite, so that a vanished suite spoils no other."""
    line, _, arch = kind.partition("-")
    key = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
    text = f"{'deb-src' if kind == 'source' else line} {key}{uri(suite)} {suite} main\n"
    top = cache_dir() / "apt" / digest(text, *([arch] if arch else []))
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (top / name).mkdir(parents=True, exist_ok=True)
    (top / "status").touch()
    write(top / "sources.list", text)
    write(top / "apt.conf", acquire() + f"""
Dir::Etc::main "{top}/none";
Dir::Etc::parts "{top}/parts";
Dir::Etc::sourcelist "{top}/sources.list";
Dir::Etc::sourceparts "{top}/parts";
Dir::Etc::preferences "{top}/none";
Dir::Etc::preferencesparts "{top}/parts";
Dir::State "{top}";
Dir::State::lists "{top}/lists";
Dir::State::status "{top}/status";
Dir::Cache "{top}/cache";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Architecture "{arch or 'amd64'}";
APT::Architectures "{arch or 'amd64'}";
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::Retries "2";
""")
    return top


def apt(top: Path, *cmd: str) -> str:
    done = subprocess.run(cmd, capture_output=True, text=True, check=False, env={
        **os.environ, "APT_CONFIG": str(top / "apt.conf"), "LC_ALL": "C"})
    if done.returncode:
        why = (done.stderr.strip() or "no message").splitlines()[-1]
        raise Failure(f"{cmd[0]} ended with status {done.returncode}: {why}: remove {top} and try "
                      "again")
    return done.stdout


def update(top: Path, suite: str, refresh: bool) -> bool:
    stamp = top / "stamp"
    if not refresh and stamp.exists() and time.time() - stamp.stat().st_mtime < DAY:
        return True
    try:
        run(["apt-get", "-o", "APT::Update::Error-Mode=any", "update"], total=4,
            what=f"apt lists of {suite}", env={"APT_CONFIG": str(top / "apt.conf")}, quiet=True)
    except Cut:
        raise
    except Failure as failure:
        if stamp.exists():
            say(f"{failure}; using the old ones, next try in an hour")
            os.utime(stamp, (soon := time.time() - DAY + 3600, soon))
        return stamp.exists()
    for memo in top.glob("versions-*"):
        memo.unlink()
    stamp.touch()
    return True


def versions(top: Path, package: str) -> list[str]:
    """Kept until the lists change: apt needs a second per suite to tell."""
    memo = top / f"versions-{package}"
    if not memo.exists():
        rows = apt(top, "apt-cache", "madison", package)
        write(memo, "\n".join(re.findall(rf"^ *{package} \| *(\S+) \|", rows, re.M)))
    return memo.read_text().split()


def newer(one: str, other: str) -> bool:
    return not subprocess.call(["dpkg", "--compare-versions", one, "gt", other])


def newest(package: str, pattern: str | None, suites: list[str], kind: str,
           refresh: bool) -> tuple[str, Path]:
    """Highest version whose upstream part matches, and the configuration that has it."""
    best: tuple[str, Path] | None = None
    reached = False
    for suite in suites:
        top = config(suite, kind)
        with locked(top / "lock"):
            if not update(top, suite, refresh):
                continue
            reached = True
            found = versions(top, package)
        for version in found:
            upstream = version.split(":")[-1].rsplit("-", 1)[0]
            if (not pattern or re.fullmatch(pattern, upstream)) and (
                    not best or newer(version, best[0])):
                best = version, top
    if not reached:
        raise Failure("the Debian mirror cannot be reached: check the network and apt's sources")
    if not best:
        raise Gone(f"no suite of {', '.join(suites)} has a fitting {package}")
    return best


def _get(kind: str, package: str, version: str, top: Path, work: Path) -> None:
    env = {"APT_CONFIG": str(top / "apt.conf")}
    cmd = ["apt-get", "source" if kind == "source" else "download", f"{package}={version}"]
    sizes = re.findall(r"^'\S+' \S+ (\d+)", apt(top, *cmd, "--print-uris"), re.M)
    with step(f"downloading {package} {version}"), locked(top / "lock"), \
            growing(work, sum(map(int, sizes)), package):
        run(cmd, what=f"download of {package}", cwd=work, env=env)
    if kind == "source":
        [tree] = [path for path in work.iterdir() if path.is_dir()]
        for path in work.iterdir():
            if path != tree:
                path.unlink()
        tree.rename(work / "tree")


def fetch(kind: str, package: str, pattern: str | None, suites: list[str]) -> Path:
    """Kept as CACHE/kind/package_version; the kind is source, deb, or deb-ARCH of another one."""
    for refresh in (False, True):
        listed = False
        try:
            version, top = newest(package, pattern, suites, kind, refresh)
            listed = True
            return entry(kind, f"{package}_{version.replace(':', '%3a')}",
                         functools.partial(_get, kind, package, version, top))
        except Cut:
            raise
        except Failure as failure:
            if listed and not refresh:
                say(f"{failure}; trying once more with fresh lists")
                continue
            cached = (cache_dir() / kind).glob(f"{package}_*")
            if not (names := sorted(cached, key=lambda path: path.stat().st_mtime)):
                raise
            say(f"{failure}; taking {names[-1].name} from the cache")
            return names[-1]
    raise AssertionError


def download(package: str, pattern: str | None, suites: list[str]) -> Path:
    """The .deb of the newest version over suites; apt has verified it."""
    [deb] = fetch("deb", package, pattern, suites).glob("*.deb")
    return deb


def foreign(arch: str, *packages: str) -> Path:
    """The unpacked packages of another architecture, of the release that this machine runs."""
    suites = ["bookworm-updates", "bookworm"]
    debs = [next(fetch(f"deb-{arch}", package, None, suites).glob("*.deb"))
            for package in packages]

    def make(work: Path) -> None:
        for deb in debs:
            run(["dpkg-deb", "-x", str(deb), str(work)], what=f"unpacking of {deb.name}")

    return entry("foreign", digest(arch, *(deb.name for deb in debs)), make)


def source(package: str, suites: list[str]) -> Path:
    """The unpacked newest source package over suites."""
    return fetch("source", package, None, suites) / "tree"
