"""Files on object stores through fsspec: names expanded, byte ranges read ahead, tried again where that may help, counted.

A range that is announced (`RemoteFiles.start`) is on its way while earlier ones are used; a read that fails in passing is tried
again with growing waits; what was tried again, and what failed for good, is counted by the file's name. Keys and endpoints are
fsspec's business (its backends' environment variables, or `FSSPEC_S3='{"anon": true}'`), so that no recipe holds a secret.
"""

from __future__ import annotations

import io
import os
import random
import re
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_BACKOFF_S = 30.0
IDLE_S = 2.0  # a thread without work ends after so long
MERGE_GAP_BYTES = 1 << 16  # neighbours that lie nearer are fetched in one piece
MERGE_MAX_BYTES = 1 << 23
BLOCK_BYTES = 1 << 20  # of a file that is read through (a shard's headers)
_URL = re.compile(r"^[A-Za-z0-9+.\-]+(::[A-Za-z0-9+.\-]+)*://")
_FOR_GOOD = (
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
)  # what another try can't mend: the file is not there or not ours, or the program is wrong
Range = tuple[str, int, int]  # URL, first byte, byte after the last


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How files on object stores are read. None of it changes what is read.

    Attributes:
        num_threads: ranges that are on their way at once, for each process.
        ahead_mb: how much may be on its way or waiting for its use, MB, for each process.
        retries: how often a read that failed in passing is tried again.
        backoff_s: the wait before the first further try; each next one is twice as long, 30 s at most.
        timeout_s: a try without an answer after so long has failed.
        index_dir: a local folder that keeps the indices of remote shards, so that they are read through only once; None: none is
            kept, and each start reads every shard's headers (for small pictures that is all of its bytes).

    Raises:
        ValueError: a number out of range.
    """

    num_threads: int = 8
    ahead_mb: int = 256
    retries: int = 5
    backoff_s: float = 0.2
    timeout_s: float = 60.0
    index_dir: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_threads", 1), ("ahead_mb", 0), ("retries", 0), ("backoff_s", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"data.remote.{name} must be at least {least}, got {getattr(self, name)}")
        if not self.timeout_s > 0:
            raise ValueError(f"data.remote.timeout_s must be above 0 seconds, got {self.timeout_s}")


class RemoteReadError(OSError):
    """A range could not be read, by whatever number of tries."""


class ReadReport:
    """What reading from afar took: reads, bytes, what was tried again and what failed for good, by file and reason.

    Attributes:
        reads, num_bytes: ranges that came, and their bytes.
        retried: (file, reason) -> tries that failed and were made again.
        failed: (file, reason) -> reads that were given up.
    """

    def __init__(self) -> None:
        self.reads = 0
        self.num_bytes = 0
        self.retried: Counter[tuple[str, str]] = Counter()
        self.failed: Counter[tuple[str, str]] = Counter()

    def add(self, other: ReadReport) -> None:
        """Count what `other` counted too."""
        self.reads += other.reads
        self.num_bytes += other.num_bytes
        self.retried += other.retried
        self.failed += other.failed

    def __bool__(self) -> bool:
        return bool(self.reads or self.retried or self.failed)

    @property
    def smooth(self) -> bool:
        """Nothing had to be tried again, nothing failed."""
        return not (self.retried or self.failed)

    def __str__(self) -> str:
        lines = [
            f"{self.reads:,} ranges ({self.num_bytes / 1e6:,.1f} MB) read from object stores; "
            f"{sum(self.retried.values()):,} tries were repeated, {sum(self.failed.values()):,} reads failed for good"
        ]
        for title, counts in (("repeated", self.retried), ("failed", self.failed)):
            lines += [f"  {name}: {title} {count} x {reason}" for (name, reason), count in counts.most_common(20)]
            if len(counts) > 20:
                lines.append(f"  and {len(counts) - 20} more that were {title}")
        return "\n".join(lines)


class _Task:
    """One range on its way."""

    __slots__ = ("attempt", "began", "data", "done", "error", "generation", "range")

    def __init__(self, range_: Range) -> None:
        self.range = range_
        self.done = threading.Event()
        self.data = b""
        self.error: RemoteReadError | None = None
        self.attempt = 0
        self.began: float | None = None  # of the try that is being made
        self.generation = 0  # rises when a thread that got no answer is given up


class RemoteFiles:
    """Reads byte ranges of files that fsspec reaches, some of them ahead of their use. Safe to fork and to pickle.

    Args:
        config: threads, tries, waits.
    """

    def __init__(self, config: RemoteConfig = RemoteConfig()) -> None:
        self.config = config
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Condition()
        self._todo: deque[_Task] = deque()
        self._running: dict[_Task, None] = {}
        self._pieces: dict[Range, tuple[_Task, int]] = {}  # announced range -> what brings it, and when it was last announced
        self._turn = 0
        self._alive = self._idle = 0
        self._systems: dict[str, Any] = {}
        self._report = ReadReport()

    def __reduce__(self) -> tuple[type[RemoteFiles], tuple[RemoteConfig]]:
        return RemoteFiles, (self.config,)

    def _own(self) -> None:
        """After a fork nothing of the parent's threads and connections may be used."""
        if self._pid != os.getpid():
            self._reset()

    def take_report(self) -> ReadReport:
        """What was counted in this process since the last call."""
        self._own()
        with self._lock:
            report, self._report = self._report, ReadReport()
        return report

    def size(self, url: str) -> int:
        """A file's length in bytes.

        Raises:
            FileNotFoundError: there is none.
            RemoteReadError: it can't be found out.
        """
        self._own()
        found = self._try_again(url, lambda system, path: system.size(path))
        if not isinstance(found, int):
            raise RemoteReadError(f"{url} does not tell its size, so ranges of it can't be read")
        return found

    def mark(self, url: str) -> str | None:
        """What changes when the file does (an ETag, a time); None where the store has no such thing."""
        self._own()
        try:
            return str(self._try_again(url, lambda system, path: system.ukey(path)))
        except (OSError, NotImplementedError):
            return None

    def _try_again(self, url: str, ask: Any) -> Any:
        """A question about a file, from the asking thread itself."""
        attempt = 0
        while True:
            try:
                return ask(*self._system(url))
            except _FOR_GOOD:
                raise
            except Exception as error:  # backends raise many kinds
                attempt += 1
                self._count(url, _words(error), attempt)
                if attempt > self.config.retries:
                    raise RemoteReadError(f"{url} {_tries(attempt)}: {_words(error)}") from error
                self._wait(attempt)

    def start(self, ranges: Iterable[Range]) -> None:
        """Announce what will be read soon: it is brought by other threads, neighbours in one piece.

        What was announced two calls ago, and neither read nor announced again, is forgotten.
        """
        self._own()
        with self._lock:
            self._turn += 1
            wanted = []
            for one in dict.fromkeys(ranges):
                if one in self._pieces:
                    self._pieces[one] = self._pieces[one][0], self._turn
                elif one[2] > one[1]:
                    wanted.append(one)
            self._pieces = {key: piece for key, piece in self._pieces.items() if piece[1] >= self._turn - 1}
            room = self.config.ahead_mb * 1_000_000 - sum(stop - first for _, first, stop in self._pieces)
            place = {one: i for i, one in enumerate(wanted)}
            for group in sorted(_merged(wanted), key=lambda group: min(place[one] for one in group)):  # in the order of their use
                first, stop = min(one[1] for one in group), max(one[2] for one in group)
                room -= stop - first
                if room < 0:
                    break  # the rest is read when it is asked for
                task = _Task((group[0][0], first, stop))
                self._pieces.update((one, (task, self._turn)) for one in group)
                self._submit(task, last=True)

    def read(self, url: str, first: int, stop: int) -> bytes:
        """Bytes `first` to `stop`, as announced or asked for now.

        Raises:
            RemoteReadError: they can't be had; it says why.
        """
        self._own()
        if stop <= first:
            return b""
        with self._lock:
            found = self._pieces.pop((url, first, stop), None)
        task = found[0] if found is not None else self.begin((url, first, stop), soon=False)
        return self.finish(task)[first - task.range[1] : stop - task.range[1]]

    def begin(self, wanted: Range, *, soon: bool = True) -> _Task:
        """Send for a range: soon, or before all that is waiting; `finish` gives its bytes."""
        self._own()
        task = _Task(wanted)
        with self._lock:
            self._submit(task, last=soon)
        return task

    def finish(self, task: _Task) -> bytes:
        """The bytes of what was begun in this process; raises RemoteReadError where they can't be had."""
        while not task.done.wait(min(1.0, self.config.timeout_s / 4)):
            self._give_up_waiting()
        if task.error is not None:
            raise task.error
        return task.data

    def _submit(self, task: _Task, *, last: bool) -> None:
        """Hand a task to a thread; the lock is held."""
        (self._todo.append if last else self._todo.appendleft)(task)
        if len(self._todo) > self._idle and self._alive < self.config.num_threads:
            self._alive += 1
            threading.Thread(target=self._work, name="wordsight-read", daemon=True).start()
        self._lock.notify()

    def _work(self) -> None:
        """A thread: task after task, until there was none for a while."""
        while True:
            with self._lock:
                while not self._todo:
                    self._idle += 1
                    woken = self._lock.wait(IDLE_S)
                    self._idle -= 1
                    if not woken and not self._todo:
                        self._alive -= 1
                        return
                task = self._todo.popleft()
                generation = task.generation
            if not self._bring(task, generation):
                return  # the task was taken from this thread, and another thread stands in for it

    def _bring(self, task: _Task, generation: int) -> bool:
        """Try until the range is there or the tries are used up; False where this thread was given up meanwhile."""
        url, first, stop = task.range
        while True:
            with self._lock:
                if task.generation != generation:
                    return False
                task.began = time.monotonic()
                self._running[task] = None
            error: Exception | None = None
            data = b""
            try:
                system, path = self._system(url)
                data = bytes(system.cat_file(path, start=first, end=stop))
                if len(data) != stop - first:
                    error = OSError(f"{len(data):,} bytes came of {stop - first:,}")
            except Exception as caught:  # backends raise many kinds
                error = caught
            with self._lock:
                if task.generation != generation:
                    return False
                task.began = None
                self._running.pop(task, None)
                if error is None:
                    self._report.reads += 1
                    self._report.num_bytes += len(data)
                    task.data = data
                    task.done.set()
                    return True
                if not self._failed(task, _words(error), again=not isinstance(error, _FOR_GOOD)):
                    return True
                attempt = task.attempt
            self._wait(attempt)

    def _failed(self, task: _Task, reason: str, *, again: bool = True) -> bool:
        """Count a try that failed; True where there is another one. The lock is held."""
        task.attempt += 1
        url = task.range[0]
        if again and task.attempt <= self.config.retries:
            self._report.retried[url, reason] += 1
            return True
        self._report.failed[url, reason] += 1
        task.error = RemoteReadError(f"bytes {task.range[1]:,} to {task.range[2]:,} of {url} {_tries(task.attempt)}: {reason}")
        task.done.set()
        return False

    def _give_up_waiting(self) -> None:
        """Take tasks from threads that have got no answer for too long; others go on in their place."""
        with self._lock:
            for task in list(self._running):
                if task.began is None or time.monotonic() - task.began <= self.config.timeout_s:
                    continue
                task.generation += 1
                task.began = None
                del self._running[task]
                self._alive -= 1
                if self._failed(task, f"no answer within {self.config.timeout_s:g} s"):
                    self._submit(task, last=False)
                elif self._todo and self._alive < self.config.num_threads:
                    self._alive += 1
                    threading.Thread(target=self._work, name="wordsight-read", daemon=True).start()

    def _count(self, url: str, reason: str, attempt: int) -> None:
        with self._lock:
            counts = self._report.retried if attempt <= self.config.retries else self._report.failed
            counts[url, reason] += 1

    def _wait(self, attempt: int) -> None:
        """Twice as long each time, less a random part, so that many readers don't come back at once."""
        longest = min(MAX_BACKOFF_S, self.config.backoff_s * 2 ** (attempt - 1))
        time.sleep(longest * random.SystemRandom().uniform(0.5, 1.0))

    def _system(self, url: str) -> tuple[Any, str]:
        """The file system behind a URL, opened once in each process for each host or bucket, and the path in it."""
        if "::" in url:
            return open_system(url)
        place = url[: url.find("/", url.index("://") + 3) + 1]
        system = self._systems.get(place)
        if system is None:
            system = self._systems[place] = open_system(url)[0]
        return system, system._strip_protocol(url)


class RemoteFile:
    """A remote file that is read through, as tarfile reads it: block by block, the next ones on their way where reading goes on.

    Args:
        files: who reads.
        url: the file.
        size: its length in bytes.
        block_bytes: of one read.
    """

    def __init__(self, files: RemoteFiles, url: str, size: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._files, self._url, self._size, self._block_bytes = files, url, size, block_bytes
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._coming: dict[int, _Task] = {}
        self._last = -1

    def tell(self) -> int:
        """The place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, count: int = -1) -> bytes:
        """The next bytes; fewer at the end of the file."""
        stop = self._size if count < 0 else min(self._size, self._at + count)
        parts = []
        while self._at < stop:
            number, skip = divmod(self._at, self._block_bytes)
            part = self._block(number)[skip : skip + stop - self._at]
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Let go of what was read."""
        self._blocks.clear()

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            reach = self._files.config.num_threads if number == self._last + 1 else 0
            end = -(-self._size // self._block_bytes)
            for one in range(number, min(number + reach + 1, end)):
                if one not in self._coming:
                    self._coming[one] = self._files.begin(self._range(one), soon=one != number)
            self._blocks[number] = self._files.finish(self._coming.pop(number))
            self._coming = {one: task for one, task in self._coming.items() if one > number}
            if len(self._blocks) > 2:
                self._blocks.popitem(last=False)
            self._last = number
        return self._blocks[number]

    def _range(self, number: int) -> Range:
        return self._url, number * self._block_bytes, min(self._size, (number + 1) * self._block_bytes)


def is_url(path: object) -> bool:
    """Whether a path is for fsspec: `s3://...`, `memory://...`, `file://...`, `simplecache::s3://...`."""
    return isinstance(path, str) and _URL.match(path) is not None


def expand_url(url: str) -> list[str]:
    """The files that a URL with braces and wildcards stands for, or the shards in the folder that it names.

    Raises:
        FileNotFoundError: no file fits a wildcard, or a folder holds no shard.
        ValueError: the braces don't match, or there is no backend for this kind of store.
    """
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(url))
    except ValueError as error:
        raise ValueError(f"the braces in {url} don't match: {error}") from error
    found: list[str] = []
    for name in names:
        from_braces = f" (from {url})" if name != url else ""
        wild = "*" in name or "[" in name or ("?" in name and not name.startswith(("http://", "https://")))
        folder = not name.lower().endswith(".tar") and name.endswith("/")
        if not wild and not folder:
            found.append(name)
            continue
        system, path = open_system(name)
        matches = sorted(system.glob(path if wild else f"{path.rstrip('/')}/*.tar"))
        if not matches:
            raise FileNotFoundError(f"no such file: {name}{'' if wild else '*.tar'}{from_braces}")
        found += [system.unstrip_protocol(match) for match in matches]
    return found


def open_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        ValueError: there is no backend for it here.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url} can't be reached: {error}") from error


def _merged(ranges: Sequence[Range]) -> list[list[Range]]:
    """Ranges in groups that are fetched in one piece: neighbours in one file."""
    groups: list[list[Range]] = []
    stop = 0
    for one in sorted(ranges):
        if groups:
            url, first, _ = groups[-1][0]
            if one[0] == url and one[1] - stop <= MERGE_GAP_BYTES and max(stop, one[2]) - first <= MERGE_MAX_BYTES:
                groups[-1].append(one)
                stop = max(stop, one[2])
                continue
        groups.append([one])
        stop = one[2]
    return groups


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no reason given"
    return f"{type(error).__name__}: {text if len(text) < 160 else text[:160] + '...'}"


def _tries(attempt: int) -> str:
    return "could not be read" if attempt == 1 else f"could not be read in {attempt} tries"
