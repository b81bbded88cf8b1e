"""Evaluation: predictions and what is computed from them, the quality of features, and maps of where a model looks."""
