"""Vision Mamba: Vim, the backbone of ARM and of Semi-ViM."""
