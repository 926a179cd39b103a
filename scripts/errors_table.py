"""Prints docs/errors.md from rafsfs.errors. `python scripts/errors_table.py > docs/errors.md`; a test holds them together."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from rafsfs import errors

HEAD = """# Errors and exit codes

Made by `scripts/errors_table.py` from `rafsfs/errors.py`; edit that.

Every command that fails prints one line, `rafs: what failed, expected and got, where, what to do`, and exits with the code below.
0 is success, 130 an interrupt (Ctrl-C), 141 a closed output pipe. `rafs check` and `rafs cache verify` exit with 12 when they find
something. The last column is what a program that reads a mounted file gets when this error stands between it and the bytes.

| code | class | meaning | reader gets |
|---:|---|---|---|
"""


def render() -> str:
    """Return the document."""
    return HEAD + "".join(
        f"| {kind.exit_code} | `{kind.__name__}` | {(kind.__doc__ or '').strip().splitlines()[0]} "
        f"| {errno.errorcode[kind.errno]} |\n"
        for kind in tree(errors.RafsError)
    )


def tree(kind: type[errors.RafsError]) -> Iterator[type[errors.RafsError]]:
    """Yield a class and its subclasses of the same module, by exit code."""
    yield kind
    children = (child for child in kind.__subclasses__() if child.__module__ == kind.__module__)
    for child in sorted(children, key=lambda child: child.exit_code):
        yield from tree(child)


if __name__ == "__main__":
    print(render(), end="")
