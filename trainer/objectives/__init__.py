"""The objectives: from a batch to sums of losses."""
