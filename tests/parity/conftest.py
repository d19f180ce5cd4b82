"""Before any reference is imported: transformers imports torchvision where it finds it, and so has to be able to."""

import importlib.util

from tests.parity import vision

if all(importlib.util.find_spec(name) for name in ("torch", "torchvision")):
    vision.available()
