"""Agents at equal cost: contests, who plays them, what the standings say."""
