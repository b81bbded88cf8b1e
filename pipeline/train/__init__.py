"""Training: the loop, the engine, checkpoints and the run's folder."""
