"""Decoding and appending to caches."""
