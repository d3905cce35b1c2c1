"""The model under DeepSpeed: parameter groups, the ZeRO backends, forward, backward and update."""
