"""Benchmarks of the checkout; not part of what is installed."""
