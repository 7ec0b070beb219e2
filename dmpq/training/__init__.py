"""Training: mixed precision, sparse upcycling, quantization-aware training, co-design."""
