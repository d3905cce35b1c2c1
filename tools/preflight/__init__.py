"""Checks of a job before it is queued: data, masks, memory, disk and hours, without a GPU."""
