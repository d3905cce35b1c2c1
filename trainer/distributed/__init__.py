"""This process among the processes of a run: ranks, signals, the lock, heartbeats, lost peers, seeds, the console."""
