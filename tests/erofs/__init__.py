"""Mounting by the kernel: decisions, bytes, guards."""
