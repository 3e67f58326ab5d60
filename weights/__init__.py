"""What a model is: contracts, the store, diffusion maths, model families and image generation."""

import os

# transformers warns at import, twice, that torchvision is missing; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
