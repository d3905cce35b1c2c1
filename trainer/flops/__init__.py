"""The cost of a step, computed from shapes: FLOPs and memory by part, and micro-batches of equal cost."""
