"""Runs networks over maps that do not fit: windows with exact borders, pooled statistics, maps in memory or on disk."""
