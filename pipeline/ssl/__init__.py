"""Semi-supervised learning: the teacher, its moving average, and pseudo-labels."""
