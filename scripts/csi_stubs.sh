#!/usr/bin/env bash
# Makes rafsfs/csi/_pb from the protocol definition of the Container Storage Interface: `make csi-stubs`. Needs Go (for the module
# that holds csi.proto) and grpcio-tools of the version in constraints.txt. What it makes is committed, and never edited by hand.
set -euo pipefail
cd "$(dirname "$0")/.."
version=v1.12.0
module=github.com/container-storage-interface/spec
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
directory=$(cd "$work" && GOFLAGS=-mod=mod go mod download -json "$module@$version" | sed -n 's/.*"Dir": "\(.*\)",*$/\1/p')
.venv/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt grpcio-tools
# The file is given a path of its own, so that what is made imports itself by its place in the package.
mkdir -p "$work/rafsfs/csi/_pb"
# Its comments are the specification's text, which is not ours to carry: what is made holds names and numbers only.
sed 's,^[[:space:]]*//.*$,,; s,[[:space:]]//.*$,,' "$directory/csi.proto" >"$work/rafsfs/csi/_pb/csi.proto"
.venv/bin/python -m grpc_tools.protoc -I "$work" --python_out=. --pyi_out=. --grpc_python_out=. rafsfs/csi/_pb/csi.proto
echo "csi stubs: made from CSI $version"
