"""Bytes behind a URL: fetched in ranges, and kept in a cache on a local disk."""
