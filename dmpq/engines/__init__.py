"""What other engines can hold, whether they would load a map, and the nearest that they do."""
