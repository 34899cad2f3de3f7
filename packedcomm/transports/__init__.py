"""Executors of chunk plans: how planned bytes move from one rank to the others."""
