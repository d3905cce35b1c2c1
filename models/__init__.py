"""Vision encoders, projectors, language models, and the VLM that joins them; the bundle on disk."""
