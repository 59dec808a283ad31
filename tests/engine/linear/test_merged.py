"""Merged linears compute what the separate ones did."""

import pytest
import torch
from torch import nn

from engine.linear.merged import merge
from engine.linear.replace import replace_linears


class Parent(nn.Module):
    def __init__(self, bias: bool):
        super().__init__()
        self.a = nn.Linear(6, 4, bias=bias)
        self.b = nn.Linear(6, 10, bias=bias)


@pytest.fixture(params=[False, True], ids=["plain", "bias"])
def parent(request: pytest.FixtureRequest) -> Parent:
    torch.manual_seed(0)
    return Parent(request.param).requires_grad_(False)


def test_merged_linears_compute_the_same_in_any_order(parent: Parent) -> None:
    x, y = torch.randn(2, 3, 6)
    expected = [parent.a(x), parent.b(x), parent.a(y), parent.b(y)]
    replace_linears(parent, merge([parent.a, parent.b]).get)
    for answers in (
        [parent.a(x), parent.b(x), parent.a(y), parent.b(y)],
        [*reversed([parent.b(x), parent.a(x)]), *reversed([parent.b(y), parent.a(y)])],
    ):
        torch.testing.assert_close(answers, expected)
    torch.testing.assert_close(
        [parent.a(x), parent.a(x), parent.a(y)], [*expected[:1] * 2, expected[2]]
    )


def test_merged_linears_have_their_weights_and_can_be_separated_again(parent: Parent) -> None:
    before = {name: p.clone() for name, p in parent.named_parameters()}
    merged = merge([parent.a, parent.b])
    replace_linears(parent, merged.get)
    assert torch.equal(parent.a.weight, before["a.weight"])
    assert torch.equal(parent.b.weight, before["b.weight"])
    originals = {replacement: linear for linear, replacement in merged.items()}
    replace_linears(parent, originals.get)
    after = dict(parent.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_results_for_an_input_are_not_kept(parent: Parent) -> None:
    replace_linears(parent, merge([parent.a, parent.b]).get)
    x = torch.randn(3, 6)
    parent.a(x), parent.b(x)
    x += 1  # an input that was changed in place counts as a new one
    torch.testing.assert_close(parent.a(x), nn.functional.linear(x, parent.a.weight, parent.a.bias))
