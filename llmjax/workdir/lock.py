"""The lock of a workdir: two runs that train in one and the same would destroy each other's checkpoints.

The first process of a run holds `lock` in its workdir, a file that says who it is. On one machine the kernel
keeps it (`flock`), and lets go of it when the process dies, however it dies. On a file system that machines
share, where `flock` may reach only as far as each of them, the holder also touches the file every few seconds:
another machine takes over only a lock that is touched no more. And a run checks before each save that the lock
is still its own, so that one which was long suspended, and taken for dead, does not write on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable

from llmjax.errors import UserError
from llmjax.files import naming

NAME = "lock"
TOUCH_SECONDS = 5.0
# How long another machine's lock must stay untouched to be taken for what a dead run left. A file system that
# machines share may show a change half a minute late.
STALE_SECONDS = 60.0
# After signing, where the file system has no locks.
SETTLE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that holds, or held, a lock.

    host     name of its machine
    pid      its number there
    started  when it began, in ticks of its machine, which tells it from a later process of the same number; or ""
    kernel   the boot of its machine and its space of numbers, within which `pid` means something; or ""
    token    drawn anew for each time that a lock is taken
    """

    host: str
    pid: int
    started: str
    kernel: str
    token: str


class Lock:
    """The right to train in `workdir`, taken when made; a context manager, which gives it back.

    Raises UserError where another run has it. Where it cannot be seen at once whether another machine's run is
    alive, this waits up to `STALE_SECONDS`, having said so through `tell`.
    """

    def __init__(self, workdir: pathlib.Path, tell: Callable[[str], None] = lambda text: None):
        self._workdir, self._tell = workdir, tell
        self._path = workdir / NAME
        self._made = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        self._me = _this_process()
        self._file = self._take()
        self._end = threading.Event()
        self._toucher = threading.Thread(target=self._touch, name="lock", daemon=True)
        self._toucher.start()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def check(self) -> None:
        """UserError where the lock is no longer this run's: the workdir must not be written to."""
        holder = _read(self._path)
        if holder != self._me:
            who = "nobody" if holder is None else f"process {holder.pid} on {holder.host}"
            raise UserError(
                f"{self._path} is now held by {who}, who took this run for dead; nothing more is written to "
                f"{self._workdir} from here, so stop one of the two"
            )

    @property
    def token(self) -> str:
        """What the other processes of this run must find in the file, on a disk that all share."""
        return self._me.token

    def release(self) -> None:
        """Gives the lock back, if it is still this run's, and leaves no empty workdir that was not there before."""
        self._end.set()
        self._toucher.join()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._me:
                self._path.unlink()
            if self._made:
                self._workdir.rmdir()
        os.close(self._file)

    def _take(self) -> int:
        """An open file that keeps the lock."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            is_handed_over = False
            try:
                kept = self._wait_for_the_other(file)
                if not _is_at(file, self._path):
                    continue  # the other has just ended and removed it
                self._sign(file)
                if not kept:
                    # Nothing but the signature decides between two that start at once.
                    time.sleep(SETTLE_SECONDS)
                    if _read(self._path) != self._me:
                        raise self._refusal(_read(self._path))
                if _is_at(file, self._path):
                    is_handed_over = True
                    return file
            finally:
                if not is_handed_over:
                    os.close(file)

    def _wait_for_the_other(self, file: int) -> bool:
        """Whether the kernel keeps the lock, when no other run has it; UserError where one has."""
        kept = _keep(file)
        holder = _read(self._path)
        if kept is False:
            # A process that was forked from the holder, and outlived it, may keep the file open.
            if holder is None or _is_here(holder) is not False:
                raise self._refusal(holder)
            self._path.unlink(missing_ok=True)  # and the kernel's lock with it: the next file is a new one
            return False
        if holder is not None and not (kept and _same_boot(holder, self._me)):
            alive = _is_here(holder)
            if self._is_touched(holder) if alive is None else alive:
                raise self._refusal(holder)
        return bool(kept)

    def _is_touched(self, holder: Holder) -> bool:
        """Whether a run on another machine still touches its lock; by the clock of the file system alone."""
        touched = _changed(self._path)
        probe = self._path.with_name(f"{NAME}.{self._me.token}")
        probe.touch()
        age = _changed(probe) - touched
        probe.unlink()
        if age > STALE_SECONDS:
            return False
        self._tell(
            f"{self._path} is held by process {holder.pid} on {holder.host}; seeing for up to {STALE_SECONDS:.0f} s "
            "whether it is alive"
        )
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            if _changed(self._path) != touched or _read(self._path) != holder:
                return True
            time.sleep(min(1.0, TOUCH_SECONDS / 4))
        return False

    def _refusal(self, holder: Holder | None) -> UserError:
        who = "another run" if holder is None else f"process {holder.pid} on {holder.host}"
        return UserError(
            f"--workdir={self._workdir} is in use: {who} trains there and holds {self._path}; stop it, or give "
            "another --workdir"
        )

    def _sign(self, file: int) -> None:
        text = json.dumps(dataclasses.asdict(self._me)) + "\n"
        with naming(self._path):
            os.ftruncate(file, 0)
            os.pwrite(file, text.encode(), 0)
            os.fsync(file)

    def _touch(self) -> None:
        while not self._end.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def wait_to_see(workdir: pathlib.Path, token: str, seconds: float = 30.0) -> None:
    """Returns when this process sees the lock that the first process of its run took; UserError where it does not.

    A disk that machines share may show a new file late; one that they do not share never shows it.
    """
    end = time.monotonic() + seconds
    while (holder := _read(workdir / NAME)) is None or holder.token != token:
        if time.monotonic() > end:
            raise UserError(
                f"--workdir={workdir} is not one and the same for all processes: the lock that process 0 took does "
                "not appear here; put it on a disk that all of them share"
            )
        time.sleep(0.1)


def _keep(file: int) -> bool | None:
    """Takes the kernel's lock on an open file: whether it was free, or None where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same_boot(one: Holder, other: Holder) -> bool:
    """Whether both ran under one kernel, in whatever container: then its lock speaks for both."""
    return one.kernel != "" and one.kernel.split()[:1] == other.kernel.split()[:1]


def _this_process() -> Holder:
    return Holder(socket.gethostname(), os.getpid(), _started(os.getpid()), _kernel(), uuid.uuid4().hex)


def _kernel() -> str:
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, or "" where that cannot be had."""
    try:
        # The second field is a name in parentheses, which may hold anything. After it come the state, where Z is
        # a process that has ended and still waits for its parent, and as the twentieth field the start.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""


def _is_here(holder: Holder) -> bool | None:
    """Whether the holder still runs, or None where this process cannot see it."""
    if not holder.kernel or holder.kernel != _kernel():
        return None
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not holder.started or _started(holder.pid) == holder.started


def _read(path: pathlib.Path) -> Holder | None:
    """Who signed the lock; None where nobody did, or where it cannot be read."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _changed(path: pathlib.Path) -> float:
    """When a file was last touched. It is opened first, for only then does NFS ask the server."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0


def _is_at(file: int, path: pathlib.Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False
