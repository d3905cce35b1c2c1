"""What a job would run into, found before it is queued: data, masks, memory, disk and hours, without a GPU."""
