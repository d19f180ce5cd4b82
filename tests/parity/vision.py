"""torchvision beside a torch without CUDA."""

import importlib


def available():
    """Makes `import torchvision` work: the operators of its wheels need CUDA, and two must be known when it starts."""
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        available.library = library  # what it defines lives as long as it does
        importlib.import_module("torchvision")
