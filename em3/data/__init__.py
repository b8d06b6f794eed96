"""Catalogues: readers, token stores, batches. The readers need the extra `train`; importing this package does not."""
