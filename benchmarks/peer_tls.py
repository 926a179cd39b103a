"""What does TLS between nodes cost? `python -m benchmarks.peer_tls`.

On loopback, one process each side, 256 MiB in chunks of 1 MiB, in the giver's page cache, into a fresh data space each time, four requests
of 4 MiB at once: the upload server and the download path of the daemon, every chunk verified, written and marked. Once plain (sendfile,
recv_into), once with mutual TLS, in turn; both sides share this machine's cores, so MB/s is of both together. CPU seconds are of both
processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from rafsfs.net.mutual_tls import MutualTls, load_mutual_tls

from .measure import Row, commit, interleave, machine, median, rate, spread, table
from .peer_throughput import SIZE, Pair, take_ours

_CERTIFICATES: Final = """
openssl ecparam -name prime256v1 -genkey -noout -out ca.key
openssl req -x509 -new -key ca.key -subj /CN=ca -days 1 -out ca.pem -addext basicConstraints=critical,CA:TRUE
openssl ecparam -name prime256v1 -genkey -noout -out node.key
openssl req -new -key node.key -subj /CN=node -out node.csr
printf 'subjectAltName=IP:127.0.0.1' > node.ext
openssl x509 -req -in node.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile node.ext -out node.pem
chmod 600 node.key
"""


def _make(directory: Path) -> MutualTls:
    subprocess.run(["sh", "-euc", _CERTIFICATES], check=True, capture_output=True, cwd=directory)
    made = load_mutual_tls(*(os.fspath(directory / name) for name in ("node.pem", "node.key", "ca.pem")))
    assert made is not None
    return made


def main() -> int:
    """Run and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_tls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="work on this disk (default: the temporary directory)")
    arguments = parser.parse_args()
    print(f"{commit()}; {machine()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="rafs-peers-", dir=arguments.dir) as directory:
        tls = _make(Path(directory))
        pair = Pair(Path(directory))
        take = partial(take_ours, at_once=4)
        seconds = interleave(
            {
                "plain": lambda: pair.run("plain", take, bare=False),
                "tls": lambda: pair.run("tls", partial(take, tls=tls), bare=False, tls=tls),
            },
            arguments.rounds,
        )
    costs = {name: median(pair.cpu[name]) / SIZE * 1e9 for name in ("plain", "tls")}
    mine, other = median(seconds["tls"]), median(seconds["plain"])
    print(table([Row(
        "peer to peer with mutual TLS, 4 requests at once", rate(SIZE, mine), f"plain: {rate(SIZE, other)}", other / mine, "-", None,
        f"{spread(seconds['tls'])}; CPU {costs['tls']:.2f} s/GB, {costs['plain']:.2f}: {costs['tls'] / costs['plain']:.2f} times",
    )]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
