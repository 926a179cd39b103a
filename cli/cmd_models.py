"""`rafs models`: what a pod does with the socket of its dynamic volume."""

from __future__ import annotations

import json
import os
from typing import Any, Final

import click

from rafsfs.errors import AccessDeniedError, CacheFullError, DaemonError, NotFoundError, RafsError, UsageError

from .options import DurationType, json_option, option
from .output import print_json
from .run import run_async

_ERRORS: Final[dict[int, type[RafsError]]] = {
    400: UsageError,
    403: AccessDeniedError,
    404: NotFoundError,
    409: UsageError,
    507: CacheFullError,
}


@click.group("models")
def command() -> None:
    """Add, list and remove models of a dynamic volume, from inside the pod that has it.

    Example: rafs models add registry.example/models/llama:v1 llama --socket /models/rafs.sock
    """


def _socket_options(function: Any) -> Any:
    for decorator in (
        option(
            "--timeout",
            envvar="RAFS_MODELS_TIMEOUT",
            type=DurationType(0.1, 3600),
            default="2m",
            show_default=True,
            help="Longest wait for the node.",
        ),
        option(
            "--socket",
            "socket_path",
            envvar="RAFS_MODELS_SOCKET",
            default="/models/rafs.sock",
            show_default=True,
            type=click.Path(),
            help="Socket in the volume.",
        ),
    ):
        function = decorator(function)
    return function


@command.command("add")
@click.argument("ref")
@click.argument("name")
@option(
    "--prefetch",
    envvar="RAFS_PREFETCH",
    type=click.Choice(["none", "all"]),
    default="none",
    show_default=True,
    help="What to fetch before it is asked for.",
)
@option("--include", multiple=True, envvar="RAFS_INCLUDE", help="Show only files that match; repeatable.")
@option("--exclude", multiple=True, envvar="RAFS_EXCLUDE", help="Leave out files that match; repeatable.")
@option("--sub-path", envvar="RAFS_SUB_PATH", default="", help="Show a directory of the model only.")
@_socket_options
@json_option
def add(ref: str, name: str, socket_path: str, timeout: float, as_json: bool, **options: Any) -> None:
    """Make the model REF appear as directory NAME of the volume. Again is fine.

    Example: rafs models add registry.example/models/llama:v1 llama --exclude '*.bin'
    """
    body = {"ref": ref, "prefetch": options["prefetch"]}
    body |= {key: list(options[key]) for key in ("include", "exclude") if options[key]}
    body |= {"subPath": options["sub_path"]} if options["sub_path"] else {}
    made = run_async(_call, socket_path, timeout, "PUT", f"/v1/models/{_quoted(name)}", body)
    if as_json:
        print_json(made)


@command.command("rm")
@click.argument("name")
@_socket_options
def remove(name: str, socket_path: str, timeout: float) -> None:
    """Take the directory NAME away. One that is not there is fine.

    Example: rafs models rm llama
    """
    run_async(_call, socket_path, timeout, "DELETE", f"/v1/models/{_quoted(name)}", None)


@command.command("ls")
@_socket_options
@json_option
def list_(socket_path: str, timeout: float, as_json: bool) -> None:
    """List the models of the volume, with how much of each is on the node.

    Example: rafs models ls
    """
    found = run_async(_call, socket_path, timeout, "GET", "/v1/models", None)
    if as_json:
        print_json(found)
        return
    for model in found["models"]:
        total = model["total_bytes"]
        share = f"{100 * model['present_bytes'] / total:.0f} %" if total else "-"
        print(f"{model['name']}  {model['state']}  {share}  {model['ref']}")


async def _call(path: str, timeout_s: float, method: str, target: str, body: dict[str, Any] | None) -> dict[str, Any]:
    import httpx  # noqa: PLC0415 - `rafs --help` does without it

    # The path of a socket holds 107 bytes; through a descriptor of its directory it may be longer.
    try:
        directory = os.open(os.path.dirname(os.path.abspath(path)), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise DaemonError(f"the volume's socket {path} is not there: {error.strerror}") from None
    transport = httpx.AsyncHTTPTransport(uds=f"/proc/self/fd/{directory}/{os.path.basename(path)}")
    try:
        async with httpx.AsyncClient(transport=transport, timeout=timeout_s, base_url="http://volume") as client:
            answer = await client.request(method, target, content=None if body is None else json.dumps(body).encode())
            value: dict[str, Any] = json.loads(answer.content)
    except (httpx.HTTPError, ValueError) as error:
        raise DaemonError(f"the volume's socket {path} does not answer: {str(error) or type(error).__name__}") from None
    finally:
        os.close(directory)
    if answer.status_code != 200:
        raise _ERRORS.get(answer.status_code, DaemonError)(str(value.get("error", answer.status_code)))
    return value


def _quoted(name: str) -> str:
    from urllib.parse import quote  # noqa: PLC0415

    return quote(name, safe="")
