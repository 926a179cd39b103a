"""A tiny FUSE server of flat data-space files, for EROFS to read what is not complete yet; raw protocol, standard library."""
