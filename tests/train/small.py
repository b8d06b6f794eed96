"""Settings of a run that takes seconds, as words of the command line."""

SMALL = [
    "encoder={width: 16, height: 32, width_pixels: 32, epochs: 1}",
    "model={id_dim: 8, hidden: [16], content_dim: 8, dim: 8, num_queries: 2, num_heads: 2, rank: 2}",
]
