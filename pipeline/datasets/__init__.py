"""Making and describing datasets: shards with a manifest, and splits of their samples."""
