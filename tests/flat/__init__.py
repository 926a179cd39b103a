"""The flat server: bytes of its protocol."""
