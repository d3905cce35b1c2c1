"""Towers and mergers of models that take images at their own size and proportions (Qwen-VL)."""
