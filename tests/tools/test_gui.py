"""Actions and screens: what is written is read back, rubbish is refused in words."""

from __future__ import annotations

import re
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ondol.tools.gui import DIRECTIONS, Action, Element, Kind, Screen

numbers = st.integers(0, 9999)
points = st.tuples(numbers, numbers)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
some = texts.filter(lambda t: t.strip())
actions = st.one_of(
    st.builds(
        lambda kind, n: Action(kind, (n,)),
        st.sampled_from(["click", "double_click", "right_click", "long_press", "hover"]),
        numbers,
    ),
    st.builds(lambda p: Action("click", points=(p,)), points),
    st.builds(lambda a, b: Action("drag", (a, b)), numbers, numbers),
    st.builds(lambda a, b: Action("drag", points=(a, b)), points, points),
    st.builds(lambda t: Action("type", text=t), texts),
    st.builds(lambda n, t: Action("type", (n,), text=t), numbers, texts),
    st.builds(lambda n, t: Action("select", (n,), text=t), numbers, texts),
    st.builds(lambda k, t: Action(k, text=t), st.sampled_from(["press", "goto", "run"]), some),
    st.builds(lambda d: Action("scroll", text=d), st.sampled_from(DIRECTIONS)),
    st.builds(lambda n, d: Action("scroll", (n,), text=d), numbers, st.sampled_from(DIRECTIONS)),
    st.builds(Action, st.sampled_from(["back", "home", "wait", "screenshot", "done"])),
    st.builds(lambda t: Action("done", text=t), some),
)


@given(actions)
def test_an_action_is_read_as_it_was_written(action):
    assert Action.parse(str(action)) == action
    assert Action.find(f"I think so.\n\n{action}\n") == action


@given(st.one_of(st.text(), st.builds("{}({})".format, st.sampled_from(get_args(Kind)), st.text())))
def test_rubbish_is_refused_in_words(text):
    try:
        action = Action.parse(text)
    except ValueError as e:
        assert 10 < len(str(e)) < 300
    else:
        assert Action.parse(str(action)) == action


@pytest.mark.parametrize(
    ("source", "action"),
    [
        (" click( 3 )\n", Action("click", (3,))),
        ("click(12, 40)", Action("click", points=((12, 40),))),
        ("type(3, hello, world)", Action("type", (3,), text="hello, world")),
        ("type(3, 'it')", Action("type", (3,), text="it")),
        ('type(3, "a \\"b\\" (c)")', Action("type", (3,), text='a "b" (c)')),
        ("type(hello, world)", Action("type", text="hello, world")),
        ("press(Control+a)", Action("press", text="Control+a")),
        ("done()", Action("done")),
        ("done(42)", Action("done", text="42")),
    ],
)
def test_ways_to_write(source, action):
    assert Action.parse(source) == action


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("click 3", "written like click"),
        ("klick(3)", "known: click"),
        ("click()", "click takes an element or a place"),
        ("click(1, 2, 3)", "click takes an element or a place"),
        ("click(99999999999)", "click takes an element or a place"),
        ("drag(3)", "drag takes two"),
        ("scroll(3, sideways)", "up, down, left, right"),
        ("select(red)", "an element and an option"),
        ("press()", "as in press(Enter)"),
        ("back(3)", "takes nothing"),
        (f"type({'x' * 3000})", "longer than"),
    ],
)
def test_what_is_wrong_is_said(source, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        Action.parse(source)


def test_places_belong_to_the_smallest_element():
    page = Element(1, "group", box=(0, 0, 100, 100))
    button = Element(2, "button", "OK", box=(10, 10, 30, 20))
    screen = Screen("", (page, button, Element(3, "menu")), 100, 100)
    assert screen.at((10, 10)) is button and screen.at((30, 19)) is page and screen.at((100, 5)) is None
    assert screen.element(2) is button and str(button) == '[2] button "OK"'
    with pytest.raises(ValueError, match="the last is 3"):
        screen.element(4)
