"""Tasks beyond next tokens: examples, the rows of a head that are compared, and metrics."""
