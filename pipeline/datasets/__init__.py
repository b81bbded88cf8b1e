"""Shards that can be trusted, streamed once, and resumed exactly at any world size."""
