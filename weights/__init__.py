"""What a model is: contracts, the store, diffusion's mathematics, families of teachers, drawing."""

import os

# transformers tells at import, twice, that torchvision is missing: nothing here needs it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
