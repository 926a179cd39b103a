"""Networking without a protocol of ours: origins, TLS, back-off, and a lean HTTP/1.1 client for bulk bytes."""
