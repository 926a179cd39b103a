#!/usr/bin/env bash
# Builds the Dockerfile without a container daemon and without a registry, and leaves the image's root file system mounted.
#
#   scripts/image.sh DIR        builds; the last line is where the root is
#   scripts/image.sh DIR clean  takes everything away
#
# The base image is what Debian itself has of the same name: Debian 12 with its Python 3.11, made by mmdebstrap and tagged as what the
# Dockerfile names, so every step of the Dockerfile runs as it stands. Packages come from where apt and pip of this machine get them. Needs root.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(realpath -m "${1:?usage: scripts/image.sh DIR [clean]}")
b() { buildah --root "$work/store" --runroot "$work/run" --storage-driver overlay "$@"; }
for program in buildah mmdebstrap; do
  command -v $program >/dev/null || { echo "image: $program is missing: apt-get install --no-install-recommends buildah mmdebstrap" >&2; exit 1; }
done
if [ "${2:-}" = clean ]; then
  b umount -a >/dev/null 2>&1 || true
  b rm -a >/dev/null 2>&1 || true
  findmnt -rno TARGET | { grep "^$work/" || true; } | sort -r | while read -r place; do umount -l "$place"; done
  rm -rf "$work"
  exit
fi
mkdir -p "$work/base"
base=docker.io/library/python:$(sed -n 's/^ARG PYTHON=//p' Dockerfile)-slim-bookworm
if ! b inspect --type image "$base" >/dev/null 2>&1; then
  # What the official image has besides: headers to compile with, `python`, and modules for venv.
  mmdebstrap -q --variant=minbase --include=python3-venv,python3-dev,python-is-python3,ca-certificates bookworm "$work/base/base.tar"
  printf 'FROM scratch\nADD base.tar /\n' >"$work/base/Dockerfile"
  b bud -q --isolation chroot -t "$base" "$work/base" >/dev/null
  rm "$work/base/base.tar"
fi
# pip inside as pip outside, whatever index and authority that is.
{
  echo "[global]"
  python3 -m pip config list 2>/dev/null | sed -nE "s/^(global|:env:)\.(index-url|extra-index-url|default-timeout|trusted-host)='(.*)'$/\2 = \3/p"
  echo "cert = /run/ca.crt"
} >"$work/pip.conf"
chmod 600 "$work/pip.conf"
b bud --isolation chroot --layers --pull=never -t localhost/rafs \
  --volume "$work/pip.conf:/etc/pip.conf:ro" --volume "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}:/run/ca.crt:ro" . >"$work/build.log" 2>&1 ||
  { tail -30 "$work/build.log" >&2; exit 1; }
b images --format '{{.Name}} {{.Size}}' >&2
b mount "$(b from --pull=never localhost/rafs)"
