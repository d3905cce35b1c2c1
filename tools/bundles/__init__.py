"""What merge, quantize and bundle share: models that run layer by layer, and checkpoints of plain DeepSpeed."""
