"""Training, evaluation and reports: what `em3 train` does. Needs the extra `train`; importing this package does not."""
