"""OS templates: a Debian root file system as a tarball, made by mmdebstrap and kept in a cache.

The packages come from the mirror that this system's own apt uses, with this system's settings for reaching it.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent.tarball import Cancel, Tarball
from migrator.errors import ExecutionError, InvalidArgument, Precondition

# In the key of what is kept: changes with what is done to make it.
VERSION = 1
SUITE = re.compile(r"[a-z][a-z-]{1,30}")
PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]{1,100}(:[a-z0-9]+)?(/[a-z0-9-]+|=[A-Za-z0-9.+:~-]+)?")
# Suites that have no updates and no security archive beside them.
ROLLING = ("sid", "unstable", "experimental")
LEFT_OUT = (
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/lintian/*",
)
KEPT = ("/usr/share/doc/*/copyright", "/usr/share/locale/locale.alias")
APT_TIMEOUT_S = 30.0


def check(suite: str, packages: Sequence[str]) -> None:
    """Raises InvalidArgument for what is not a suite or a package name."""
    if not SUITE.fullmatch(suite):
        raise InvalidArgument(f"{suite!r} is not the name of a Debian suite, such as bookworm")
    for package in packages:
        if not PACKAGE.fullmatch(package):
            raise InvalidArgument(f"{package!r} is not the name of a Debian package")


def build(
    cache: Path,
    suite: str,
    packages: Sequence[str],
    report: Callable[[str], None],
    cancel: Cancel,
    *,
    refresh: bool = False,
) -> Tarball:
    """The tarball for a suite and packages, from the cache unless `refresh`. One at a time for each of them.

    Raises ExecutionError with mmdebstrap's last words, Precondition, Cancelled.
    """
    check(suite, packages)
    cache.mkdir(parents=True, exist_ok=True)
    target = cache / f"{suite}-{_key(suite, packages)}.tar.zst"
    with _locked(target.with_suffix(".lock"), report):
        if target.exists() and not refresh:
            report(f"taking the packages' root file system from the cache: {target.name}")
        else:
            _debootstrap(cache, target, suite, packages, report=report, cancel=cancel)
    return Tarball(target, ("zstd", "-dcq"))


def sweep(cache: Path) -> None:
    """Remove the working folders of builds that nobody works on; hosts may share a cache."""
    for folder in cache.glob("build-*"):
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass  # somebody is working in it
        finally:
            os.close(descriptor)


def _key(suite: str, packages: Sequence[str]) -> str:
    text = "\n".join([str(VERSION), platform.machine(), suite, *sorted(set(packages))])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _debootstrap(
    cache: Path, target: Path, suite: str, packages: Sequence[str], *, report: Callable[[str], None], cancel: Cancel
) -> None:
    if shutil.which("mmdebstrap") is None:
        raise Precondition(
            "mmdebstrap is not installed: run scripts/setup, or import a tarball", reason="NO_MMDEBSTRAP"
        )
    archives = cache / "packages"
    archives.mkdir(exist_ok=True)
    with _working_folder(cache) as folder:
        settings = folder / "apt.conf"
        settings.write_text(_apt("apt-config", "dump", "Acquire"))
        new = folder / "root.tar.zst"
        command = ["mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar"]
        if packages:
            command.append(f"--include={','.join(sorted(set(packages)))}")
        command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
        command += [f"--dpkgopt=path-include={pattern}" for pattern in KEPT]
        command += _cache_hooks(archives, settings)
        command += [suite, str(new), *sources(suite)]
        report(f"building {suite} with {', '.join(packages) or 'nothing'} added; this takes a minute or two")
        _run(command, folder, report, cancel)
        new.replace(target)


def _cache_hooks(archives: Path, settings: Path) -> list[str]:
    """Hooks that lend the build this system's apt settings and what was fetched before (mmdebstrap(1), HOOKS)."""
    configuration = "etc/apt/apt.conf.d/00host"
    return [
        "--skip=essential/unlink",
        f"--setup-hook=copy-in {_quoted(settings)} /etc/apt/apt.conf.d",
        f'--setup-hook=mv "$1"/etc/apt/apt.conf.d/{settings.name} "$1"/{configuration}',
        '--setup-hook=mkdir -p "$1"/var/cache/apt/archives',
        f"--setup-hook=sync-in {_quoted(archives)} /var/cache/apt/archives",
        f"--customize-hook=sync-out /var/cache/apt/archives {_quoted(archives)}",
        f'--customize-hook=rm -rf "$1"/{configuration} "$1"/var/cache/apt/archives/*.deb',
    ]


def sources(suite: str) -> list[str]:
    """Lines for sources.list. Raises Precondition if apt knows no Debian mirror."""
    text = _apt(
        "apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Identifier: Packages", "Component: main"
    )
    mirrors = dict(reversed([line.split(" ", 1) for line in text.splitlines() if " " in line]))
    mirror = mirrors.get("Debian")
    if mirror is None:
        raise Precondition(
            "apt on this host knows no Debian mirror: add a source with the component main, and run apt-get update",
            reason="NO_MIRROR",
        )
    lines = [f"deb {mirror} {suite} main"]
    if suite not in ROLLING:
        lines.append(f"deb {mirror} {suite}-updates main")
        if "Debian-Security" in mirrors:
            lines.append(f"deb {mirrors['Debian-Security']} {suite}-security main")
    return lines


def _apt(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=APT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExecutionError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise ExecutionError(f"{command[0]} exited with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _run(command: list[str], folder: Path, report: Callable[[str], None], cancel: Cancel) -> None:
    """Run mmdebstrap and report what it says. It ends with the agent: it is of no use to anybody else."""
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    environment |= {"TMPDIR": str(folder), "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig=TERM", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        errors="replace",
        text=True,
        bufsize=1,
    )
    words: list[str] = []
    with cancel.covering(process):
        assert process.stdout is not None
        for line in process.stdout:
            if text := line.strip():
                words = [*words[-19:], text]
                report(text)
        code = process.wait()
        process.stdout.close()
    cancel.check()
    if code != 0:
        complaints = [word for word in words if word.startswith(("E:", "W:", "dpkg:"))] or words
        raise ExecutionError(
            f"mmdebstrap exited with code {code}: {' / '.join(complaints[-4:])}", reason="BUILD_FAILED"
        )


@contextmanager
def _working_folder(cache: Path) -> Iterator[Path]:
    # apt's own user must be able to enter it.
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
    folder.chmod(0o755)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


@contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another build of the same packages")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _quoted(path: Path) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_./+-]+", str(path)):
        raise Precondition(f"the cache folder {path} has characters in its name that a build cannot handle")
    return str(path)
