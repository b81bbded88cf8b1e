"""Which part of a model trains: all of it, its classifier alone, or low-rank updates of its layers (LoRA)."""
