"""Requests that come and go while an engine runs, for property-based tests."""


def run_eagerly(step):
    """In place of a CUDA graph: the captured shape, run anew each time."""
    step()
    return step


def run(engine, requests, arrivals, cancels):
    """Tokens and finish reason of each request, submitted and cancelled at the given steps."""
    ids, made, ends = {}, [[] for _ in requests], [None] * len(requests)
    for step in range(600):
        for i, request in enumerate(requests):
            if arrivals[i] == step:
                ids[engine.submit(request)] = i
            if cancels[i] == step and arrivals[i] <= step:
                engine.cancel(next(id for id, j in ids.items() if j == i))
        for output in engine.step():
            assert ends[ids[output.id]] is None, "a finished request makes nothing more"
            made[ids[output.id]] += output.tokens
            ends[ids[output.id]] = output.finish_reason
        if step > 12 and engine.idle:
            break
    assert engine.idle
    return made, ends
