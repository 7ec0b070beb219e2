"""``python -m dmpq.hardware``: devices shown, fitted, measured and explained."""
