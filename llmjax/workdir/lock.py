"""The lock of a workdir. Two runs that train in the same workdir would destroy each other's checkpoints.

The first process of a run writes the file `lock` into its workdir, which says who it is, and locks the file with
`flock`. On one machine this is enough: the kernel releases the lock when the process dies, however it dies. On a file
system that several machines share, `flock` may be seen only by the machine that called it. Therefore the holder also
touches the file every few seconds, and another machine takes over only a lock that has not been touched for a while.
A run that was suspended for long may be taken for dead. It checks before each save that the lock is still its own, and
stops writing if it is not.
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
# A choice: a twelfth of STALE_SECONDS, so that a few late touches do no harm.
TOUCH_SECONDS = 5.0
# A lock of another machine that was not touched for this long belongs to a dead run. A file system that machines share
# may show a change half a minute late, and this is twice that.
STALE_SECONDS = 60.0
# A choice: how long to wait after signing, where the file system has no locks, for a rival that signs at the same time.
SETTLE_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process that holds, or held, a lock.

    host     name of its machine
    pid      its process id on that machine
    started  when the process began, in clock ticks since the machine booted. It tells the process from a later one with
             the same id; "" where unknown
    kernel   the id of the machine's boot and the namespace of process ids, in which alone `pid` means something; ""
             where unknown
    token    a random text, drawn each time that a lock is taken
    """

    host: str
    pid: int
    started: str
    kernel: str
    token: str


class Lock:
    """The right to train in `workdir`. Making one takes the lock; as a context manager it gives the lock back.

    Raises UserError where another run has the lock. Whether a run on another machine is alive cannot be seen at once:
    this says so through `tell` and then waits for up to `STALE_SECONDS`.
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
        """Raises UserError where another run has taken the lock, so that this one must not write to the workdir."""
        holder = _read(self._path)
        if holder != self._me:
            who = "nobody" if holder is None else f"process {holder.pid} on {holder.host}"
            raise UserError(
                f"{self._path} is now held by {who}, who took this run for dead; nothing more is written to "
                f"{self._workdir} from here, so stop one of the two"
            )

    @property
    def token(self) -> str:
        """The token in the lock file, by which the other processes of this run see that they share its disk."""
        return self._me.token

    def release(self) -> None:
        """Gives the lock back if it is still this run's. Removes the workdir if this made it and it is empty."""
        self._end.set()
        self._toucher.join()
        with contextlib.suppress(OSError):
            if _read(self._path) == self._me:
                self._path.unlink()
            if self._made:
                self._workdir.rmdir()
        os.close(self._file)

    def _take(self) -> int:
        """Takes the lock; returns the open file, which holds the lock as long as it is open."""
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            is_handed_over = False
            try:
                kept = self._wait_for_the_other(file)
                # A run that has just ended removed the file that was opened here: a lock on it protects nothing.
                if not _is_at(file, self._path):
                    continue
                self._sign(file)
                if not kept:
                    # Without locks, of two runs that start at once the one that signed last has the lock.
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
        """Whether the kernel holds the lock for this run. Raises UserError where another run has it."""
        kept = _keep(file)
        holder = _read(self._path)
        if kept is False:
            # A process that was forked from the holder, and outlived it, may keep the file open.
            if holder is None or _is_here(holder) is not False:
                raise self._refusal(holder)
            # The next attempt makes a new file, on which the kernel has no lock yet.
            self._path.unlink(missing_ok=True)
            return False
        if holder is not None and not (kept and _same_boot(holder, self._me)):
            alive = _is_here(holder)
            if self._is_touched(holder) if alive is None else alive:
                raise self._refusal(holder)
        return bool(kept)

    def _is_touched(self, holder: Holder) -> bool:
        """Whether a run on another machine still touches its lock."""
        # Clocks of machines differ. Both times are those of the file system: the age is that of a new file beside it.
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
        """Writes who holds the lock into it, and waits until it is on disk, where other machines see it."""
        text = json.dumps(dataclasses.asdict(self._me)) + "\n"
        with naming(self._path):
            os.ftruncate(file, 0)
            os.pwrite(file, text.encode(), 0)
            os.fsync(file)

    def _touch(self) -> None:
        """Runs in a thread: shows other machines that this run is alive, until the lock is released."""
        while not self._end.wait(TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def wait_to_see(workdir: pathlib.Path, token: str, seconds: float = 30.0) -> None:
    """Waits until this process sees the lock file that the first process of its run wrote.

    token    the one in that file
    seconds  how long to wait. A shared disk may show a new file late

    Raises UserError where the file does not appear, so that the workdir is on no shared disk.
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
    """Takes the kernel's lock on an open file. False where another process has it; None where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _same_boot(one: Holder, other: Holder) -> bool:
    """Whether both processes run under the same kernel, also in different containers, so that `flock` covers both."""
    return one.kernel != "" and one.kernel.split()[:1] == other.kernel.split()[:1]


def _this_process() -> Holder:
    return Holder(socket.gethostname(), os.getpid(), _started(os.getpid()), _kernel(), uuid.uuid4().hex)


def _kernel() -> str:
    """The boot of this machine and this process's namespace of process ids, or "" where Linux does not say."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine began, or "" where it has ended or nothing is known."""
    try:
        # The second field is the program's name in parentheses, and may itself hold spaces and parentheses. The fields
        # after it begin with the state, in which Z means ended but not yet reaped; the twentieth is the start.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    except (OSError, IndexError):
        return ""


def _is_here(holder: Holder) -> bool | None:
    """Whether the holder still runs. None where it runs under another kernel or namespace, which cannot be seen."""
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
    """The holder that the lock file names; None where it names none or cannot be read."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _changed(path: pathlib.Path) -> float:
    """When a file was last touched, or 0 where it cannot be opened."""
    # NFS answers a plain stat from its cache, and asks the server only when a file is opened.
    with contextlib.suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime
    return 0.0


def _is_at(file: int, path: pathlib.Path) -> bool:
    """Whether the open file is still the one at `path`, and was not removed or replaced."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False
