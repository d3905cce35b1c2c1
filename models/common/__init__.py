"""Shared by all packages: errors, exit codes, files, model sources, sharded weights, byte ranges, free memory."""
