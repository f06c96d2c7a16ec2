"""Sweeps: points that are composed, built and measured one by one, and which of them to keep."""
