"""Search the values of config keys: trials are ordinary runs, chosen by their best validation and never by a test set.

- `space`: what is searched, and one trial as overrides (torch-free).
- `study`: the trials in Optuna's journal, which is the only place that knows Optuna.
- `trials`: what one trial runs and what it reached.
- `search`: the command, on this machine or in rounds on SLURM.
"""
