"""Benchmarks: ``python -m benchmarks SUITE`` times our ops and every installed peer side by side on this machine."""
