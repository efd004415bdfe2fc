"""Text for training: corpora, held-out parts, tokenising, mixtures and the order of samples."""
