"""A synthetic data set, and tiny backbones pretrained on it separately.

Owns: drawn scenes with captions and questions (`world`), a tiny CLIP (`clip`), a tiny language model that reads
only text (`language`), and the import of llama2.c files (`import-llama2c`). Does not own any part of the training
chain: its results are read by the ordinary commands, like any other data and weights.
"""
