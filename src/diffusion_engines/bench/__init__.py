"""Latency, memory and throughput, engines and PyTorch in one run."""
