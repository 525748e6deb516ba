"""Staircase attention: one pass over a context serves all windows of a sequence, at a cost of O(k)."""
