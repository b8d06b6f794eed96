"""The ``torch`` backend: the absorbed and tiled forms in plain PyTorch. Serves every device and dtype."""
