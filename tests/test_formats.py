import numpy as np
import pytest

from dmpq.errors import InputError
from dmpq.formats import Format, Menu


def test_two_bits_in_groups_of_128_cost_what_they_store():
    assert Menu.parse("2").effective_bits(128) == pytest.approx(2.25)
    assert Menu.parse("2", quantizer="rtn").effective_bits(128) == pytest.approx(2 + 18 / 128)
    assert Menu.parse("2", symmetric=True).effective_bits(128) == pytest.approx(2.125)


def test_a_group_is_never_wider_than_the_input():
    assert Menu.parse("4").effective_bits(64) == pytest.approx(4 + 32 / 64)


def test_full_precision_has_no_overhead():
    assert Menu.parse("16").stored_bits((3, 128)).tolist() == [3 * 128 * 16]


def test_menu_is_ordered_by_cost():
    menu = Menu.parse("16,4,2g32,2")
    assert menu.keys == ("2", "2g32", "4", "16")
    assert (np.diff(menu.effective_bits(128)) > 0).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("5", "Bit-width 5 is not on offer; choose among 2, 3, 4, 8, 16"),
        ("two", "'two' is not a format"),
        ("", "menu of bit-widths is empty"),
        ("4,4", "names a format twice"),
        ("16g32", "16 bits are stored without groups"),
        ("4g0", "Group size 0 is not positive"),
    ],
)
def test_bad_menus_say_what_is_allowed(keys, message):
    with pytest.raises(InputError, match=message):
        Menu.parse(keys)


def test_unknown_quantizer_is_named_with_the_closest():
    with pytest.raises(InputError, match="did you mean 'hqq'"):
        Menu.parse("4", quantizer="hqqq")


def test_group_that_does_not_divide_the_input_is_refused():
    with pytest.raises(InputError, match="does not divide an input width of 96"):
        Format(4, 64).group_along(96)


def test_every_width_is_offered_in_groups_of_every_size():
    menu = Menu.parse("2,3,16", group_sizes="32, 64,128")
    assert menu.keys == ("2", "2g64", "2g32", "3", "3g64", "3g32", "16")
    assert menu == Menu.parse("2,2g64,2g32,3,3g64,3g32,16")
    assert Menu.parse("4", group_sizes="128") == Menu.parse("4")


@pytest.mark.parametrize(
    ("keys", "sizes", "words"),
    [
        ("2,4g32", "64", "'4g32' names its group"),
        ("2,4", " ,", "No group sizes"),
        ("2,4", "64,64", "names a format twice"),
        ("2,4", "many", "2gmany"),
        ("2,4", "-32", "2g-32"),
    ],
)
def test_group_sizes_that_make_no_sense_are_refused(keys, sizes, words):
    with pytest.raises(InputError, match=words):
        Menu.parse(keys, group_sizes=sizes)
