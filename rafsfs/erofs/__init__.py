"""The kernel's EROFS as the reader of our images: what this kernel can do, mounting, and guarding what is not there yet."""
