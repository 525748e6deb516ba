"""Waiting with a deadline."""

import time


def wait_until(condition, failure, seconds=30, pause=0.01):
    """Return as soon as the condition holds; fail with this text, or what this function returns, after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, failure() if callable(failure) else failure
        time.sleep(pause)
