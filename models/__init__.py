"""Vision encoders, projectors, language models, and the VLM that joins them; the bundle on disk."""

import logging

# On some processors each import of bitsandbytes, so each of peft, asks to install `kernels`, which would fetch code
# from a hub; without it bitsandbytes 0.50 computes with kernels of its own (backends/cpu/ops.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
