"""Guards: `pytest benchmarks` fails when speed or memory is lost. Ratios within one run, against floors.yaml."""
