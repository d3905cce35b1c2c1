"""Language models: pretrained or from scratch, and their tokenizers."""
