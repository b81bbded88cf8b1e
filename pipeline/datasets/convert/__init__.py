"""Sources of images in several layouts, and the writer that makes shards of them."""
