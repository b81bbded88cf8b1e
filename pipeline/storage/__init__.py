"""Bytes of remote files, and a local cache of them."""
