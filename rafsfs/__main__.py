"""`python -m rafsfs`: the command line. The one place where this package reaches up to `cli`."""

from __future__ import annotations

if __name__ == "__main__":
    from cli.main import run

    run()
