"""Building images: from files to bootstrap, chunk map and blobs."""
