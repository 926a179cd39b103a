"""`python -m rafsfs`: the command line. The one place where this package reaches up to `cli`."""

from __future__ import annotations

import sys

from .errors import UsageError
from .siblings import check_siblings

if __name__ == "__main__":
    try:
        check_siblings()
    except UsageError as error:
        print(f"rafs: {error}", file=sys.stderr)  # noqa: T201 - `cli`, which prints elsewhere, is what cannot be loaded
        sys.exit(error.exit_code)
    from cli.main import run

    run()
