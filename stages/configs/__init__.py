"""The config and the spec of each stage, a file per stage. Nothing here imports torch."""
