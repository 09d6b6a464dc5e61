"""Blocks without compiled graphs, nested and overlapping."""

import torch

from mdnorm.integration.dependence import uncompiled


def graphs_after(function):
    found = []

    def backend(graph, _):
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(torch.ones(2))
    return len(found)


def test_blocks_may_overlap_in_any_order():
    first, second = uncompiled(), uncompiled()
    first.__enter__()
    assert graphs_after(torch.sin) == 0
    second.__enter__()
    first.__exit__(None, None, None)
    assert graphs_after(torch.sin) == 0
    second.__exit__(None, None, None)
    assert graphs_after(torch.sin) == 1


def test_an_error_ends_the_block():
    try:
        with uncompiled():
            raise KeyError
    except KeyError:
        pass
    assert graphs_after(torch.sin) == 1
