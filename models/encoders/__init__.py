"""Vision encoders: where their weights come from, and what the data pipeline must know of them."""
