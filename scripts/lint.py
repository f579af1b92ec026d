#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""make lint: every checker there is for what this repository holds."""
import shutil
import tempfile
from pathlib import Path

import apt
import kernel
import series
from ui import JOBS, REPO, Failure, digest, entry, main, repository, run, say, step


def sparse() -> Path:
    """Debian 12's own is too old for a 7.3 kernel."""
    source = apt.source("sparse", ["forky", "sid"])

    def make(work: Path) -> None:
        with step(f"building {source.parent.name}"):
            run(["sh", "-ec", f'cp -a "$1" build && make -C build CC=gcc -j{JOBS} sparse &&'
                 " mv build/sparse . && rm -r build", "build", str(source)],
                what="sparse", cwd=work)

    return entry("sparse", f"{source.parent.name}-{digest(apt.linked())}", make) / "sparse"


def interpreter(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline().decode(errors="replace")


def texts(everything: list[Path]) -> None:
    # these become parts of mails and of the kernel's own files
    parts = ("series", "Kconfig", "MAINTAINERS")
    bare = [path for path in everything if path.parts[len(REPO.parts)] not in parts
            and b"SPDX-License-Identifier: " not in path.read_bytes()[:300]]
    if bare:
        raise Failure(f"no SPDX line in {', '.join(str(path.relative_to(REPO)) for path in bare)}")
    shell = [str(path) for path in everything if interpreter(path).startswith(("#!/bin/sh",
             "#!/bin/bash", "#!/usr/bin/env bash"))]
    python = [str(path) for path in everything if path.suffix == ".py"]
    run(["shellcheck", *shell], what="shellcheck")
    run(["/usr/bin/python3", "-m", "pyflakes", *python], what="pyflakes")
    run(["pycodestyle", "--max-line-length=100", "--ignore=W503,W504", *python], what="pycodestyle")
    cxx = [str(path) for path in everything if path.suffix in (".cpp", ".hpp")]
    run(["clang-format", "--dry-run", "-Werror", *cxx], what="clang-format")


def documents(everything: list[Path]) -> None:
    """A project of our documents alone, with the kernel's heading: Sphinx must find no fault."""
    pages = [path for path in everything if path.suffix == ".rst"]
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        names = "\n   ".join(Path(shutil.copy(path, top)).stem for path in pages)
        (top / "conf.py").write_text("")
        (top / "index.rst").write_text(f"=====\nIndex\n=====\n\n.. toctree::\n\n   {names}\n")
        run(["/usr/bin/sphinx-build", "-q", "-n", "-W", "--keep-going", name, f"{name}/html"],
            what="sphinx-build")


def sources(everything: list[Path]) -> None:
    checker = sparse()
    origin = kernel.origin()
    commits = series.load(origin.base)
    with kernel.workplace(origin, "w1") as (pristine, tree, build), kernel.whole(build):
        more = ["C=2", f"CHECK={checker}"]
        kernel.sync(pristine, tree, {})
        before = kernel.erofs(tree, build, origin.base, *more)
        version = kernel.kernel_version(pristine)
        kernel.sync(pristine, tree, series.apply(commits, pristine, version))
        ours = [str(path) for path in everything if path.is_relative_to(REPO / "fs")
                and path.suffix in (".c", ".h")]
        if ours:
            kernel.checkpatch(tree, "-f", *ours, what="checkpatch")
            run([f"{tree}/scripts/kernel-doc", "-none", "-Wall", "-Werror", *ours],
                what="kernel-doc")
        kernel.compare(before, kernel.erofs(tree, build, origin.base, *more))


def lint() -> None:
    apt.ensure("git", "perl", "shellcheck", "python3-pyflakes", "pycodestyle", "clang-format",
               "python3-sphinx")
    everything = repository(REPO)
    with step("licence lines, shell, Python, C++"):
        texts(everything)
    with step("documents"):
        documents(everything)
    with step("checkpatch, kernel-doc, W=1 and sparse on fs/erofs"):
        sources(everything)
    say("lint: nothing to complain about")


if __name__ == "__main__":
    main(lint)
