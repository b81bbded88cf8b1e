"""Ways to start the stages: on this machine and on SLURM; what to check before, and how to follow a run."""
