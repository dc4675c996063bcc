"""Nearest neighbours: exact, and approximate through hnswlib."""
