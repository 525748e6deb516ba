"""Rollouts of the frozen teacher on actors of their own: which rows, how they are made, streamed and cached."""
