"""`rafs get`: a file of a web server, or files of an image, into a directory, through the node's cache and the swarm."""

from __future__ import annotations

import os
from typing import Any

import click

from rafsfs.errors import UsageError

from .options import (
    cache_dir_option,
    json_option,
    option,
    registry_options,
    scheduler_option,
    take_registry_options,
)
from .output import print_json, size
from .run import run_async, say


@click.command("get")
@click.argument("source", metavar="URL|REF")
@click.argument("directory", type=click.Path(file_okay=False))
@click.argument("paths", nargs=-1)
@option("--name", envvar="RAFS_GET_NAME", default="", help="What to call the file of a URL.  [default: as in the URL]")
@option(
    "--digest",
    envvar="RAFS_GET_DIGEST",
    default="",
    metavar="sha256:HEX",
    help="Of the file of a URL: nothing appears that is something else.",
)
@option("--force", is_flag=True, envvar="RAFS_GET_FORCE", help="Replace the file of a URL if it is there.")
@option(
    "--header",
    "headers",
    multiple=True,
    envvar="RAFS_GET_HEADERS",
    metavar="'NAME: VALUE'|@FILE",
    help="Send this with requests to the host of the URL, and to no other; @FILE: one a line. The file is then private.",
)
@option(
    "--netrc",
    is_flag=True,
    envvar="RAFS_GET_NETRC",
    help="Take a user and password from ~/.netrc. The file is then private.",
)
@option(
    "--ignore-query",
    "ignored",
    multiple=True,
    envvar="RAFS_GET_IGNORE_QUERY",
    metavar="NAME",
    help="A parameter of the URL's query that does not change the file; '*': all of them.",
)
@option(
    "--share/--no-share",
    envvar="RAFS_GET_SHARE",
    default=None,
    help="Take from, and give to, other nodes: also a private file; not even a public one.  [default: public ones]",
)
@scheduler_option
@cache_dir_option
@json_option
@registry_options
def command(
    source: str,
    directory: str,
    paths: tuple[str, ...],
    name: str,
    digest: str,
    force: bool,
    headers: tuple[str, ...],
    netrc: bool,
    ignored: tuple[str, ...],
    share: bool | None,
    scheduler: str,
    cache_dir: str,
    as_json: bool,
    **options: Any,
) -> None:
    """Fetch the file URL (http or https), or the files of the image REF, into DIRECTORY.

    Of an image, all files, or those that PATHS (with *, ** and ?) name, into an empty directory. Bytes come through the node's cache and,
    with a scheduler, from other nodes; a fetch that was broken off goes on from there.

    Example: rafs get https://models.example/llama/model.safetensors ./llama
    """
    registry = take_registry_options(options)
    common = {"scheduler": scheduler, "cache_dir": cache_dir, "bar": not as_json}
    if source.lower().startswith(("http://", "https://")):
        from .get_url import UrlRequest, get_url  # noqa: PLC0415 - one of the two is needed

        if paths:
            raise UsageError("paths can be given for an image only")
        request = UrlRequest(source, directory, name, digest, force, headers, netrc, ignored, share)
        result = run_async(get_url, request, registry, common)
    else:
        from .get_image import get_image  # noqa: PLC0415

        if name or digest or force or headers or netrc or ignored or share is not None:
            raise UsageError("only --scheduler, --cache-dir, --json and the options of registries go with an image")
        result = run_async(get_image, source, os.path.abspath(directory), paths, registry, common)
    if as_json:
        print_json(result)
        return
    sources = result["sources"]
    print(
        f"{result['path']}: {size(result['bytes'])}, {size(sources.get('origin', 0))} fetched, "
        f"{size(sources.get('peer', 0))} from other nodes, {result['seconds']:.1f} s"
    )
    if result.get("reason") and scheduler:
        say(f"not shared with other nodes: {result['reason']}")
