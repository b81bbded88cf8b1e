"""Evaluation: predictions and what is computed from them, probes of features, and maps of where a model looks."""
