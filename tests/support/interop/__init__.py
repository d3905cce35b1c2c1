"""What `sightline export` writes, opened by other programs in environments of their own (`make interop`)."""
