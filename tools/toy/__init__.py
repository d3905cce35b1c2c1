"""A small world that can be learnt, and tiny backbones pretrained on it apart from each other.

Owns: drawn scenes with captions and questions (`world`), a tiny CLIP (`clip`), a tiny language model that reads
only text (`language`), and the import of llama2.c files (`import-llama2c`). Does not own any part of the training
chain: what is made here is read by the ordinary commands, as anybody's data and weights would be.
"""
