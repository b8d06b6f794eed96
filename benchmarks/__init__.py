"""What em3 gains over what a user would have instead, measured on this machine: ``python -m benchmarks``."""
