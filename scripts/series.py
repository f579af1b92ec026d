#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-only
"""The patch series: what it makes of a tree (library), and the mails of it (make series)."""
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import apt
from ui import REPO, Failure, main, output, repository, run, say, step

FIRST = "7.3"  # the base whose commit messages the other bases share


@dataclass(frozen=True)
class Commit:
    name: str
    subject: str
    body: str
    cc: tuple[str, ...]
    changelog: str
    files: dict[str, bytes]
    inserts: tuple[tuple[str, str, bytes], ...]  # target, line it goes before (or ""), content
    diff: str

    def touched(self) -> list[str]:
        return [*self.files, *(insert[0] for insert in self.inserts),
                *re.findall(r"^diff --git a/\S+ b/(\S+)$", self.diff, re.M)]


def _parts(path: Path) -> tuple[dict[str, list[str]], str, str, str]:
    """Header, body, changelog and diff of a file of the series."""
    text = path.read_text()
    start = found.start() if (found := re.search(r"^diff --git ", text, re.M)) else len(text)
    head, _, rest = text[:start].partition("\n\n")
    body, _, changelog = f"\n{rest}".partition("\n---\n")
    header: dict[str, list[str]] = {}
    for line in head.splitlines():
        key, _, value = line.partition(":")
        if key not in ("Subject", "Cc", "Files", "Insert"):
            raise Failure(f"{path.relative_to(REPO)}: header line {line!r}: "
                          "expected Subject:, Cc:, Files: or Insert:")
        header.setdefault(key, []).append(value.strip())
    return header, body.strip(), changelog.strip(), text[start:]


def _files(names: list[str], path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in " ".join(names).split():
        top = REPO / name
        members = repository(top) if top.is_dir() else [top]
        if not members or not members[0].exists():
            raise Failure(f"{path.relative_to(REPO)} names {name}: no such file here")
        found |= {str(member.relative_to(REPO)): member.read_bytes() for member in members}
    return found


def _insert(row: str, path: Path) -> tuple[str, str, bytes]:
    found = re.fullmatch(r"(\S+) into (\S+)(?: before (.+))?", row)
    if not found or not (REPO / found[1]).exists():
        raise Failure(f"{path.relative_to(REPO)}: {row!r}: expected FILE into TARGET [before LINE]")
    return found[2], found[3] or "", (REPO / found[1]).read_bytes()


def _undo(commit: Commit, name: str, data: bytes) -> bytes:
    """The file before the commit: what is at its final path is what the last one makes of it."""
    parts = re.split(r"^(?=diff --git )", commit.diff, flags=re.M)
    diff = "".join(part for part in parts if part.startswith(f"diff --git a/{name} b/{name}\n"))
    if not diff:
        return data
    with tempfile.TemporaryDirectory() as scratch:
        (file := Path(scratch) / "file").write_bytes(data)
        done = subprocess.run(["patch", "--reverse", "--fuzz=0", "--force",
                               "--no-backup-if-mismatch", str(file)], input=diff,
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failure(f"{commit.name}: what it changes in {name} is not there: {done.stdout}")
        return file.read_bytes()


def load(base: str) -> list[Commit]:
    """All commits with the content of their new files: one reading, which no edit can split."""
    commits = []
    for path in sorted((REPO / "series" / base).glob("[0-9]*.patch")):
        header, body, changelog, diff = _parts(path)
        files = _files(header.get("Files", []), path)
        inserts = tuple(_insert(row, path) for row in header.get("Insert", []))
        first = REPO / "series" / FIRST / path.name
        if not body and first != path and first.exists():
            header, body, changelog, _ = _parts(first)
        if not (subject := " ".join(header.get("Subject", []))) or not body:
            raise Failure(f"{path.relative_to(REPO)} needs a Subject and a message")
        commits.append(Commit(f"series/{base}/{path.name}", subject, body,
                              tuple(header.get("Cc", [])), changelog, files, inserts, diff))
    for later in reversed(range(len(commits))):
        for commit in commits[:later]:
            for name in commit.files:
                commit.files[name] = _undo(commits[later], name, commit.files[name])
    return commits


def _patch(commit: Commit, scratch: Path, version: str) -> None:
    done = subprocess.run(["patch", "-p1", "--fuzz=0", "--force", "--no-backup-if-mismatch"],
                          cwd=scratch, input=commit.diff, capture_output=True, text=True,
                          check=False)
    if done.returncode:
        file = ""
        for line in done.stdout.splitlines():
            file = line.removeprefix("patching file ") if "patching file" in line else file
            if "FAILED" in line or "malformed" in line:
                break
        raise Failure(f"{commit.name} does not apply to {file or 'the tree'} of Linux {version}: "
                      "choose another BASE or KSRC, or mend the diff")


def apply(commits: list[Commit], pristine: Path, version: str) -> dict[str, bytes]:
    """The content of every file that the commits touch."""
    names: set[str] = set()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for commit in commits:
            for path in commit.touched():
                target = scratch / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if path in commit.files:
                    target.write_bytes(commit.files[path])
                elif path not in names and (pristine / path).exists():
                    target.write_bytes((pristine / path).read_bytes())
            names.update(commit.touched())
            for path, before, content in commit.inserts:
                text = (scratch / path).read_bytes()
                at = text.find(f"\n{before}\n".encode()) + 1 if before else len(text)
                if not at:
                    raise Failure(f"{commit.name}: {path} of Linux {version} "
                                  f"has no line {before!r}")
                (scratch / path).write_bytes(text[:at] + content + text[at:])
            if commit.diff:
                _patch(commit, scratch, version)
        return {path: (scratch / path).read_bytes() for path in sorted(names)}


def _identity() -> dict[str, str]:
    name, email = (output(["git", "-C", str(REPO), "config", f"user.{what}"], check=False).strip()
                   for what in ("name", "email"))
    if not name or not email:
        raise Failure("git does not know who signs off: run git config user.name NAME "
                      "and git config user.email ADDRESS")
    return {"GIT_AUTHOR_NAME": name, "GIT_AUTHOR_EMAIL": email,
            "GIT_COMMITTER_NAME": name, "GIT_COMMITTER_EMAIL": email}


def _cover(base: str) -> str:
    for name in (base, FIRST):
        if (path := REPO / "series" / name / "cover-letter").exists():
            return path.read_text()
    raise Failure(f"series/{base}/cover-letter is missing: write it, subject in the first line")


class Scratch:
    """A repository of the touched files only, to let git write the mails."""

    def __init__(self, top: Path) -> None:
        self.top, self.env = top, _identity()
        self.git("init", "-q", "-b", "series")

    def git(self, *args: str) -> None:
        run(["git", *args], what=f"git {args[0]}", cwd=self.top, env=self.env)

    def commit(self, content: dict[str, bytes], message: str, trailers: list[str]) -> None:
        for name, data in content.items():
            (self.top / name).parent.mkdir(parents=True, exist_ok=True)
            (self.top / name).write_bytes(data)
        text = self.top / ".git/message"
        text.write_text(f"{message}\n")
        self.git("interpret-trailers", "--in-place", *(f"--trailer={row}" for row in trailers),
                 str(text))
        self.git("add", "-A")
        self.git("commit", "-q", "-F", str(text))


def _mails(scratch: Scratch, out: Path, version: str, commits: list[Commit],
           cover: str) -> list[Path]:
    scratch.git("config", "branch.series.description", cover)
    shutil.rmtree(out, ignore_errors=True)
    scratch.git("format-patch", "-q", "-n", "--cover-letter", "--cover-from-description=subject",
                f"--signature=applies to Linux {version}", "-o", str(out),
                f"HEAD~{len(commits)}")
    mails = sorted(out.glob("*.patch"))[1:]
    for commit, mail in zip(commits, mails, strict=True):
        if commit.changelog:
            mail.write_text(mail.read_text().replace(
                "\n---\n", f"\n---\n{commit.changelog}\n\n", 1))
    return mails


def emit() -> None:
    import kernel  # which imports this module for load() and apply()

    apt.ensure("git", "perl")
    source = kernel.origin()
    commits = load(source.base)
    if not commits:
        raise Failure(f"series/{source.base} has no commits")
    cover, out = _cover(source.base), REPO / "out/series" / source.base
    with (tempfile.TemporaryDirectory() as name,
          kernel.workplace(source, "w1") as (pristine, tree, build)):
        version = kernel.kernel_version(pristine)
        scratch = Scratch(Path(name))
        signed = "Signed-off-by: {GIT_AUTHOR_NAME} <{GIT_AUTHOR_EMAIL}>".format(**scratch.env)
        touched = {path for commit in commits for path in commit.touched()}
        scratch.commit({path: (pristine / path).read_bytes() for path in sorted(touched)
                        if (pristine / path).exists()}, f"Linux {version}", [])
        with step(f"building fs/erofs of Linux {version}"), kernel.whole(build):
            kernel.sync(pristine, tree, {})
            before = kernel.erofs(tree, build, source.base)
        for number, commit in enumerate(commits, 1):
            content = apply(commits[:number], pristine, version)
            with step(f"building fs/erofs with {commit.name}"), kernel.whole(build):
                kernel.sync(pristine, tree, content)
                kernel.compare(before, kernel.erofs(tree, build, source.base))
            scratch.commit(content, f"{commit.subject}\n\n{commit.body}",
                           [*(f"Cc: {who}" for who in commit.cc), signed])
        with step("building fs/erofs without compression"), kernel.whole(build):
            kernel.compare(before, kernel.erofs(tree, build, source.base,
                                                without=r"EROFS_FS_(?:ZIP|KUNIT)\w*"))
        mails = _mails(scratch, out, version, commits, cover)
        for commit, mail in zip(commits, mails, strict=True):
            # every mail with a new file gets the first one, whichever of them changes MAINTAINERS,
            # and a tree without its history knows no commit of a Fixes:
            ignore = ["--ignore=FILE_PATH_CHANGES,UNKNOWN_COMMIT_ID"]
            if any(path.startswith("include/trace/") for path in commit.touched()):
                # TRACE_EVENT() looks like a function call but is not laid out like one
                ignore += ["--ignore=OPEN_ENDED_LINE,PARENTHESIS_ALIGNMENT"]
            if any(path.endswith(".cpp") for path in commit.touched()):
                ignore += ["--ignore=REPEATED_WORD"]  # a type and a variable that differ in case
            kernel.checkpatch(tree, *ignore, str(mail), what=f"checkpatch of {mail.name}")
    say(f"{len(mails)} commits: each builds with W=1 and passes checkpatch.pl --strict")
    print(*sorted(out.glob("*.patch")), sep="\n")


if __name__ == "__main__":
    main(emit)
