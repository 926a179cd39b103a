"""The Container Storage Interface: models as Kubernetes volumes. docs/csi.md."""
