"""The node as a mirror of registries for programs that know nothing of RAFS: containerd, docker, podman. docs/containerd.md."""
