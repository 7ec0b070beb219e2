import pytest
from torch import nn

from dmpq.overrides import overridden


def test_what_stood_before_stands_again_even_where_blocks_are_nested():
    bare, wrapped = nn.Identity(), nn.Identity()
    wrapped.forward = own = lambda x: x + 1
    with overridden([bare, wrapped], "forward", [lambda x: 5, lambda x: 6]):
        assert (bare(0), wrapped(0)) == (5, 6)
        with overridden([bare], "forward", [lambda x: 7]):
            assert bare(0) == 7
        assert bare(0) == 5
    assert "forward" not in vars(bare)
    assert wrapped.forward is own


def test_an_error_inside_changes_nothing_of_that():
    module = nn.Identity()

    def failing(_x):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), overridden([module], "forward", [failing]):
        module(0)
    assert "forward" not in vars(module)
