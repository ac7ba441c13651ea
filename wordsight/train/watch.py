"""A process of a run that is gone stops the others within a minute, with a sentence: each holds a connection to the main one.

The system closes the connections of a process that dies, however it dies, so its end is seen at once; a machine that is switched
off closes nothing, so everybody also sends a beat, and silence counts as an end. A collective operation that waits for a
process that is gone may wait for ever and can't be interrupted from Python: the thread here then ends the process itself. So no
operation needs a time limit, and the others may wait for the main process as long as it works.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wordsight.train.distributed import World

BEAT_S = 3.0
SILENCE_S = 40.0  # no beat for so long: its machine is gone, or the process is frozen
START_S = 600.0  # within which every process must have come
GRACE_S = 5.0  # how long the main thread gets to notice a loss by itself, before the process is ended
LEAVING_S = 10.0  # more, to end by itself once it has noticed
NEWS_S = 5.0  # how long a failed connection waits to be explained by a loss
_NETWORK = re.compile(r"connection|peer|gloo|nccl|timed? ?out|socket|store|broken pipe", re.IGNORECASE)


class LostProcessError(ConnectionError):
    """Another process of the run is gone, so this one can't go on.

    Attributes:
        said: whether the sentence stands on stderr already.
    """

    said = False


class Watch:
    """Watches the other processes of a run while it is open, from a thread of its own.

    Args:
        world: the processes.
        store: what they have in common already (a torch.distributed Store); it carries the main process's port.
    """

    def __init__(self, world: World, store: Any) -> None:
        self._world = world
        self._lost: tuple[int, str] | None = None
        self._noticed = threading.Event()
        self._closed = threading.Event()
        self._failures: dict[int, str] = {}
        self._said = False
        self._listener: socket.socket | None = None
        self._peers: dict[socket.socket, _Peer] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = socket.socketpair()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._deadline = float("inf")
        self._start = time.monotonic()
        if world.is_main:
            self._token = secrets.token_hex(16)
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world.size)
            self._selector.register(self._listener, selectors.EVENT_READ)
            store.set("wordsight/watch", f"{self._listener.getsockname()[1]} {self._token}")
        else:
            port, self._token = store.get("wordsight/watch").decode().split()
            connection = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), int(port)), timeout=60)
            connection.sendall(f"hello {self._token} {world.rank}\n".encode())
            self._add(connection, 0)
        os.register_at_fork(after_in_child=self._forget)
        self._thread = threading.Thread(target=self._run, name="wordsight-watch", daemon=True)
        self._thread.start()

    def explain(self, error: BaseException) -> LostProcessError | None:
        """The loss behind an error of the main thread, where there is one; it must end then by itself."""
        network = isinstance(error, RuntimeError) and bool(_NETWORK.search(str(error)))
        if network:
            self.wait_for_news(NEWS_S)
        if self._lost is not None and (network or isinstance(error, SystemExit)):
            self._noticed.set()
            lost = LostProcessError(self._lost[1])
            lost.said = self._said or not self._speaks(self._lost[0])
            return lost
        return None

    def tell(self, error: BaseException) -> bool:
        """Say to the others that this process ends with `error`.

        Returns:
            whether the main process ends with the same words, which need not be said twice.
        """
        self._noticed.set()
        text = f"{type(error).__name__}: {error}"
        self._send_all("failed " + json.dumps(text[:500]))
        if not self._world.is_main and isinstance(error, ValueError | OSError):
            end = time.monotonic() + 1
            while time.monotonic() < end and 0 not in self._failures and self._lost is None:
                time.sleep(0.01)
            return self._failures.get(0) == text[:500]
        return False

    def wait_for_news(self, timeout_s: float) -> bool:
        """Whether a process is gone, known within `timeout_s`."""
        end = time.monotonic() + timeout_s
        while self._lost is None and time.monotonic() < end:  # not an Event: a signal's handler waits here too
            time.sleep(0.01)
        return self._lost is not None

    def close(self) -> None:
        """Leave in peace: from here on the end of this process, and of others, is no loss."""
        self._send_all("bye")
        self._closed.set()
        self._waker.send(b".")
        self._thread.join(timeout=10)
        self._forget()

    # the thread

    def _run(self) -> None:
        next_beat = 0.0
        while not self._closed.is_set():
            for key, _ in self._selector.select(timeout=0.5):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is not self._wake:
                    self._receive(key.fileobj)  # type: ignore[arg-type]
            now = time.monotonic()
            if now >= next_beat:
                self._send_all("beat")
                next_beat = now + BEAT_S
            for peer in list(self._peers.values()):
                if not peer.left and now - peer.heard > SILENCE_S:
                    self._lose(peer.rank, f"no sign of life for {SILENCE_S:.0f} s: its machine is gone, or it is frozen")
            if self._world.is_main and now - self._start > START_S:
                come = {peer.rank for peer in self._peers.values()} | {0}
                for rank in sorted(set(range(self._world.size)) - come):
                    self._lose(rank, f"it did not start within {START_S:.0f} s")
            if now >= self._deadline + (LEAVING_S if self._noticed.is_set() else 0):
                if not self._said:
                    self._say()
                os._exit(1)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        self._add(connection, -1)

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._peers[connection] = _Peer(rank)
        self._selector.register(connection, selectors.EVENT_READ)

    def _receive(self, connection: socket.socket) -> None:
        peer = self._peers[connection]
        try:
            data = connection.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._selector.unregister(connection)
            with self._lock:
                peer.gone = True
            if peer.rank >= 0 and not peer.left:
                self._lose(peer.rank, "its connection closed: it was killed, or its machine ran out of memory")
            return
        peer.heard = time.monotonic()
        *lines, peer.buffer = (peer.buffer + data).split(b"\n")
        for line in lines:
            self._hear(peer, line.decode("utf-8", "replace"))
        if peer.rank < 0 and len(peer.buffer) > 1000:  # no process of ours
            peer.gone = True
            self._selector.unregister(connection)
            connection.close()

    def _hear(self, peer: _Peer, line: str) -> None:
        word, _, rest = line.partition(" ")
        if peer.rank < 0:
            found = rest.split()
            if word == "hello" and len(found) == 2 and secrets.compare_digest(found[0], self._token):
                peer.rank = int(found[1])
        elif word == "bye":
            peer.left = True
        elif word == "failed":
            peer.left = True
            self._failures[peer.rank] = json.loads(rest)
            self._lose(peer.rank, f"it failed with {json.loads(rest)}", killed=False)
        elif word == "lost":
            rank, killed, why = json.loads(rest)
            self._lose(rank, why, killed=killed)

    def _lose(self, rank: int, why: str, *, killed: bool = True) -> None:
        """Note that a process is gone, pass it on, and give the main thread its time."""
        if self._lost is not None:
            return
        size = self._world.size
        self._lost = (
            rank,
            f"process {rank} of {size} is gone ({why}), so the others stop too. What was saved is whole: give the same command "
            "again to go on from it, with fewer processes or a smaller batch at once if memory ran out.",
        )
        if self._world.is_main:
            self._send_all("lost " + json.dumps([rank, killed, why]))
        if killed and not self._noticed.is_set():
            self._say()  # at once: whoever started us may end us next
        self._deadline = time.monotonic() + GRACE_S

    def _say(self) -> None:
        assert self._lost is not None
        if self._speaks(self._lost[0]) and not self._said:
            self._said = True
            print(f"Error: {self._lost[1]}", file=sys.stderr, flush=True)

    def _speaks(self, lost: int) -> bool:
        """Whether this process says it: one on each machine does."""
        world = self._world
        first = world.rank - world.local_rank
        return world.rank == (first + 1 if lost == first else first)

    def _send_all(self, line: str) -> None:
        with self._lock:
            for connection, peer in self._peers.items():
                if peer.rank >= 0 and not peer.gone:
                    try:
                        connection.send(line.encode() + b"\n")
                    except OSError:  # who is gone is noticed by reading
                        continue

    def _forget(self) -> None:
        """Close the sockets of this process; in a forked child too, which must not hold its parent's connections open."""
        for connection in [*self._peers, self._wake, self._waker, *([self._listener] if self._listener else [])]:
            connection.close()


class _Peer:
    """What is known of the other end of a connection; rank -1 until it has said its own."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.heard = time.monotonic()
        self.buffer = b""
        self.left = False  # in peace
        self.gone = False


def on_terminate(watch: Watch) -> Any:
    """SIGTERM raises SystemExit, so that its reason can be told, where nobody else handles it; the handler that was there before,
    None where nothing was changed."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return None

    def leave(number: int, _frame: Any) -> None:
        watch.wait_for_news(2)  # a launcher ends the others as soon as one is gone
        raise SystemExit(128 + number)

    return signal.signal(signal.SIGTERM, leave)
