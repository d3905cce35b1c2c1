"""From a checkpoint to a bundle: merge, quantize, compare."""
