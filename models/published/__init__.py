"""Vision-language models that are published whole, as what a run starts from: LLaVA's family, and our own bundles."""
