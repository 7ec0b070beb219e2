"""From tensors in files to quantized folders, and to profiles of what memory cannot hold."""
