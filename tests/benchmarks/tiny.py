"""A shape of each operation that takes no time, in every variant that changes what is computed."""

from em3.benchmarks.shapes import Shape

QFORMER = {"B": 17, "N": [9, 5], "C": [16, 8], "D": 16, "H": 4, "Q": 3, "tokens": "frozen", "lengths": "full"}
TARGET = {"B": 17, "N": 6, "C": 8, "D": 16, "H": 4, "R": 2, "Q": 1, "bank": 30, "lengths": "full"}
LINEAR = {"T": 20, "C": 8, "D": 16, "R": 2, "G": 0}

SHAPES = [
    Shape("qformer_attention", "one stream", QFORMER | {"N": [9], "C": [16]}, ""),
    Shape("qformer_attention", "two streams", QFORMER, ""),
    Shape("qformer_attention", "skewed", QFORMER | {"lengths": "skewed"}, ""),
    Shape("qformer_attention", "skewed, trained", QFORMER | {"lengths": "skewed", "tokens": "trained"}, ""),
    Shape("lora_linear", "shared", LINEAR, ""),
    Shape("lora_linear", "adapters", LINEAR | {"G": 3}, ""),
    Shape("lora_target_attention", "full", TARGET, ""),
    Shape("lora_target_attention", "skewed", TARGET | {"lengths": "skewed"}, ""),
    Shape("lora_target_attention", "candidates", TARGET | {"Q": 5}, ""),
    Shape("contrastive_loss", "usual", {"B": 24, "V": 8}, ""),
]
