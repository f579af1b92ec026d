#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""The programs that run in the guest."""
import shutil
from pathlib import Path

import apt
from ui import JOBS, REPO, digest, entry, output, run, step

SOURCE = REPO / "tools/testing/selftests/erofs"
NAMES = ("dio_read", "dio_speed")


def programs() -> list[Path]:
    apt.ensure()
    sources = [SOURCE / "Makefile", *sorted(SOURCE.glob("*.[ch]pp"))]

    def make(work: Path) -> None:
        for path in sources:
            shutil.copy(path, work)
        with step("building the test programs"):
            run(["make", f"-j{JOBS}"], what="test programs", cwd=work)

    made = entry("programs", digest(output(["g++", "--version"]), *sources), make)
    return [made / name for name in NAMES]
