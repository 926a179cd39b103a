"""The bytes of an image: bootstrap, content tables, chunk map, codecs, manifest. Sans-IO: bytes in, values out.

Rule: any bytes give a value or a FormatError, within time and memory that their own length bounds. Nothing here opens a
file, a socket or a clock. Specifications: docs/format/.
"""
