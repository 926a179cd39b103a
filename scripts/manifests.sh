#!/usr/bin/env bash
# Writes deploy/manifests/rafs.yaml, what the chart is with deploy/manifests/values.yaml. Needs Go, with which helm is built.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
(cd tests/support/helm && go build -o "$work/helm" helm.sh/helm/v3/cmd/helm)
{
  echo "# Made from deploy/chart by \`make manifests\`; edit that."
  "$work/helm" template rafs deploy/chart --namespace rafs-system --kube-version 1.36.0 --values deploy/manifests/values.yaml
} >"$work/rafs.yaml"
mv "$work/rafs.yaml" deploy/manifests/rafs.yaml
