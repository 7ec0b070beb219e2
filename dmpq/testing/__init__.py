"""Test classes to inherit: what passes them fits in."""
