"""Exact and near-exact solvers of what adds up: knapsacks, limits, projection."""
