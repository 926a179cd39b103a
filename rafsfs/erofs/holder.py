"""The process that keeps descriptors alive when those who use them die. Run by path, with the bare interpreter and no module of ours.

`holder.py SOCKET LOG [stay]`: listens on SOCKET (SOCK_SEQPACKET, 0600, root or its own user only). One message, one answer, the same
in every version, since holder and daemon may be of different ones:

    put NAME + descriptor   ok          drop NAME   ok          argv A\\0B\\0C   ok: how to start a daemon
    get NAME                ok + descriptor, or none            list           names, one a line
    rest                    ok: the daemon that is connected goes on purpose            end   ok: end if nothing is held

Decided here: when a daemon is started. Nobody else would do it when daemon and worker are gone, and readers would wait for ever. So: when
the last connection ends without `rest`, or a process dies whose pidfd is held as `pid/...`, and nobody is connected; again after a
growing pause until somebody connects. With `stay`, where a supervisor looks after daemon and holder (containers in pods of their own),
it starts none, serves until SIGTERM, and takes the place of a socket that was left over. Rules: descriptors are never used but for poll
on `pid/...`; any fault in a message ends that connection only; SIGTERM, SIGINT and SIGHUP are ignored but with `stay`, so that what ends
a group of processes does not end this one.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import sys
import time

LARGEST = 65536
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


class Holder:
    """What is held, who is connected."""

    def __init__(self, path: str, log: str, *, stay: bool) -> None:
        self.path = path
        self.log = log
        self.stay = stay
        self.held: dict[str, int] = {}
        self.connections: dict[int, socket.socket] = {}
        self.argv: list[str] = []
        self.resting = True
        self.pause = FIRST_PAUSE_S
        self.start_at = 0.0
        self.listener = self.listen()

    def listen(self) -> socket.socket:
        directory = os.open(os.path.dirname(self.path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self.stay:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.basename(self.path), dir_fd=directory)
        old = os.umask(0o177)
        try:
            listener.bind(f"/proc/self/fd/{directory}/{os.path.basename(self.path)}")
        finally:
            os.umask(old)
            os.close(directory)
        listener.listen(16)
        return listener

    def run(self) -> None:
        """Serve until there is nothing to hold and nobody to serve."""
        connected_once = False
        while self.stay or self.held or self.connections or not connected_once:
            poller = select.poll()
            poller.register(self.listener, select.POLLIN)
            for number in self.connections:
                poller.register(number, select.POLLIN)
            watched = {} if self.connections else {fd: n for n, fd in self.held.items() if n.startswith("pid/")}
            for number in watched:
                poller.register(number, select.POLLIN)
            idle = self.resting or self.connections or not self.held
            wait_ms = None if idle else max(0, int((self.start_at - time.monotonic()) * 1000))
            for number, _ in poller.poll(wait_ms):
                if number == self.listener.fileno():
                    self.accept()
                    connected_once = True
                elif number in self.connections:
                    self.serve(self.connections[number])
                elif number in watched:
                    os.close(self.held.pop(watched[number]))
                    self.resting = False
            self.reap()
            if not self.resting and not self.connections and self.held and time.monotonic() >= self.start_at:
                self.start_daemon()

    def accept(self) -> None:
        connection, _ = self.listener.accept()
        uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
        if uid not in (0, os.geteuid()):
            connection.close()
            return
        connection.settimeout(5.0)
        self.connections[connection.fileno()] = connection
        self.resting = False
        self.pause = FIRST_PAUSE_S

    def serve(self, connection: socket.socket) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(connection, LARGEST, 1)
            if not data:
                raise OSError("closed")
            answer, given = self.answer(data.decode(), descriptors)
            socket.send_fds(connection, [answer.encode()], given)
        except (OSError, ValueError):
            del self.connections[connection.fileno()]
            connection.close()
            self.start_at = time.monotonic() + self.pause

    def answer(self, message: str, descriptors: list[int]) -> tuple[str, list[int]]:
        verb, _, rest = message.partition(" ")
        if verb == "put" and descriptors:
            old = self.held.pop(rest, -1)
            self.held[rest] = descriptors.pop()
            os.set_inheritable(self.held[rest], False)  # a daemon that is started here must not keep a copy
            if old >= 0:
                os.close(old)
        elif verb == "drop":
            if rest in self.held:
                os.close(self.held.pop(rest))
        elif verb == "get":
            return ("ok", [self.held[rest]]) if rest in self.held else ("none", [])
        elif verb == "list":
            return "\n".join(self.held) or "\n", []
        elif verb == "argv":
            self.argv = rest.split("\0")
        elif verb == "rest":
            self.resting = True
        elif verb != "end":
            raise ValueError(verb)
        for descriptor in descriptors:
            os.close(descriptor)
        return "ok", []

    def start_daemon(self) -> None:
        if self.stay:
            self.resting = True
            return
        self.start_at = time.monotonic() + self.pause
        self.pause = min(self.pause * 2, LONGEST_PAUSE_S)
        if not self.argv:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, self.log, flags, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        ignored = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        try:
            os.posix_spawn(self.argv[0], self.argv, os.environ, file_actions=actions, setsid=True, setsigdef=ignored)
        except OSError as error:
            print(f"holder: a daemon cannot be started: {error}", file=sys.stderr, flush=True)  # noqa: T201 - its log

    def reap(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return


def main() -> None:
    """Run the holder of the socket named on the command line."""
    stay = sys.argv[3:] == ["stay"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # The first process of a container gets no signal that it does not ask for.
        signal.signal(number, (lambda *_: sys.exit(0)) if stay else signal.SIG_IGN)
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("-1000")
    except OSError:
        os.getpid()  # without the right to: as killable as anybody
    os.chdir("/")
    Holder(sys.argv[1], sys.argv[2], stay=stay).run()


if __name__ == "__main__":
    main()
