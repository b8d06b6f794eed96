"""What em3 gains over what a user would have instead, measured on this machine: `em3 bench`. Installed as em3.benchmarks."""
