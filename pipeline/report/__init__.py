"""Reports: tables, figures, the HTML page, and TensorBoard."""
