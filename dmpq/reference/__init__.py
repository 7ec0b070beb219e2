"""The bundled Mixture-of-Experts checkpoint, its card and its profile."""
