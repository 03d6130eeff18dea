"""All files of a mounted file system copied into another one, by two tars: owners, modes, times, links, attributes."""

import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from agent.tarball import Cancel, Full
from migrator.errors import ExecutionError

_WHOLE = ["--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner"]
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def copy_files(source: Path, target: Path, cancel: Cancel) -> None:
    """Sockets are left out. Raises Full if the target is too small, ExecutionError, Cancelled."""
    read = ["tar", "--create", "--file=-", f"--directory={source}", "--one-file-system", "--sparse", *_WHOLE]
    read += ["--warning=no-file-ignored", "--exclude=./lost+found", "."]
    write = ["tar", "--extract", "--file=-", f"--directory={target}", "--same-owner", "--same-permissions", *_WHOLE]
    write += ["--delay-directory-restore", "--warning=no-timestamp"]
    with ExitStack() as resources:
        # A file, since nobody reads the complaints before the end.
        complaints = resources.enter_context(tempfile.TemporaryFile())
        reader = subprocess.Popen(read, stdout=subprocess.PIPE, stderr=complaints, env=_ENVIRONMENT)
        resources.enter_context(cancel.covering(reader))
        assert reader.stdout is not None
        writer = subprocess.Popen(
            write, stdin=reader.stdout, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=_ENVIRONMENT
        )
        reader.stdout.close()
        with cancel.covering(writer):
            _, errors = writer.communicate()
        code = reader.wait()
        complaints.seek(0)
        said = complaints.read(65536).decode(errors="replace").strip()
    cancel.check()
    if writer.returncode != 0:
        words = errors.decode(errors="replace")
        if "No space left on device" in words:
            raise Full(f"the files of {source} do not fit")
        raise ExecutionError(f"the files cannot be written: tar says {words.strip()[-400:]}")
    if code != 0:
        raise ExecutionError(f"the files cannot be read: tar says {said[-400:]}")
