"""The commands of `em3`, one module each with `add_arguments(parser)` and `run(args) -> int`."""
