#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""erofs-utils, built from Debian's newest source package."""
import shutil
from pathlib import Path

import apt
from ui import JOBS, Failure, digest, entry, main, output, run, step

SUITES = ["forky", "sid"]
PROGRAMS = ("mkfs/mkfs.erofs", "fsck/fsck.erofs", "dump/dump.erofs")
CONFIGURE = ("./configure --disable-fuse --enable-multithreading --enable-lz4 --enable-lzma "
             "--with-libdeflate --with-libzstd --with-zlib --without-selinux --without-xxhash "
             "--without-libcurl --without-libxml2 --without-json-c --without-openssl "
             "--without-libnl3")
FEATURES = ("lz4", "lz4hc", "lzma", "deflate", "libdeflate", "zstd")


def erofs_utils() -> Path:
    """Directory with mkfs.erofs, fsck.erofs and dump.erofs."""
    apt.ensure()
    source = apt.source("erofs-utils", SUITES)

    def make(work: Path) -> None:
        build = work / "build"
        shutil.copytree(source, build, symlinks=True)
        with step(f"building {source.parent.name}"):
            run(["sh", "-ec", f"./autogen.sh && {CONFIGURE} && make -j{JOBS}"],
                what="erofs-utils", cwd=build, total=160)
        for program in PROGRAMS:
            shutil.move(build / program, work)
        shutil.rmtree(build)
        lost = set(FEATURES) - set(output([str(work / "mkfs.erofs"), "--help"]).split())
        if lost:
            raise Failure(f"mkfs.erofs was built without {', '.join(sorted(lost))}: "
                          "remove what shadows Debian's compression libraries")

    return entry("erofs-utils", f"{source.parent.name}-{digest(apt.linked(), CONFIGURE)}", make)


if __name__ == "__main__":
    main(lambda: print(erofs_utils()))
