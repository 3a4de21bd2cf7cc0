"""Pages of Anthropic's list of models."""

import pytest

from broker.dialects.anthropic_models import LIMIT, models_page, page_of
from broker.errors import BadRequest

NAMES = [f"m{number}" for number in range(25)]


@pytest.mark.parametrize(
    ("asked", "first", "last", "more"),
    [
        ({}, "m0", "m19", True),
        ({"limit": "25"}, "m0", "m24", False),
        ({"limit": "24"}, "m0", "m23", True),
        ({"after_id": "m19"}, "m20", "m24", False),
        ({"after_id": "m3", "limit": "2"}, "m4", "m5", True),
        ({"before_id": "m3", "limit": "2"}, "m1", "m2", True),
        ({"before_id": "m2", "limit": "2"}, "m0", "m1", False),
        ({"before_id": "m24"}, "m4", "m23", True),
    ],
)
def test_a_page_is_what_lies_beside_a_name(asked: dict[str, str], first: str, last: str, more: bool) -> None:
    page, has_more = page_of(NAMES, asked)
    assert (page[0], page[-1], has_more) == (first, last, more)
    assert page == NAMES[NAMES.index(first) : NAMES.index(last) + 1] and len(page) <= int(asked.get("limit", LIMIT))


def test_after_the_last_and_before_the_first_is_nothing() -> None:
    assert page_of(NAMES, {"after_id": "m24"}) == ([], False)
    assert page_of(NAMES, {"before_id": "m0"}) == ([], False)
    assert models_page([], has_more=False) == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "1001"}, "limit"),
        ({"limit": "99999"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "²"}, "limit"),
        ({"after_id": "x"}, "after_id"),
        ({"before_id": "x"}, "before_id"),
        ({"before_id": "m1", "after_id": "m2"}, "before_id"),
    ],
)
def test_a_wrong_page_is_told(asked: dict[str, str], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        page_of(NAMES, asked)
    assert caught.value.param == param
