"""Reading a dataset while training: the order of its samples, their bytes, their views, and batches of them."""
