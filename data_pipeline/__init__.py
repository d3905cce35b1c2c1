"""Tar shards -> samples -> tokens and pixels -> packed batches."""

import sightline_packages

sightline_packages.check()
