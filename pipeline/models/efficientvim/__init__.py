"""EfficientViM: the model, its mixers, and its two forms for inference (fused, packed)."""
