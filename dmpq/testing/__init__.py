"""Test classes to inherit: an agent, an environment or a hardware model that passes them fits in."""
