"""Benchmarks of packedcomm and its peers; run from a checkout, never installed."""
