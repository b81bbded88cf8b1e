"""A run on many ranks, acted out on one machine: what each rank would read, open, write and send."""
