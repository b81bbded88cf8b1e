"""Exports: models as whole, verified folders; weights from outside in, and models out for other runtimes."""
