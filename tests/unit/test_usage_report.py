"""A report adds the same counters up in any way, and says it in words that stay."""

import csv
import io
import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.usage_table import count, usage_csv, usage_table
from broker.figures import NOBODY, By, counts
from broker.usage_report import BY, Report

MONDAY, TUESDAY = date(2026, 11, 23), date(2026, 11, 24)
NAMES = st.builds(
    By,
    caller=st.sampled_from(["ann", "ci"]),
    lane=st.sampled_from(["big", "small", "big.batch"]),
    asked_model=st.sampled_from(["big", "small"]),
    model=st.sampled_from(["big", "small"]),
)
FIGURES = st.sampled_from(
    [
        "done", "done/in_time/448", "done/in_time/18", "done/late/9216", "cancelled", "cancelled/no_token",
        "expired/no_token", "failed/runtime_failed/late/512", "failed/worker_lost", "refused/lane_full", "tokens_in",
        "tokens_cached", "tokens_out", "untold", "queued_ms", "running_ms", "promoted/late", "released",
        "recovered/queued", "recovered/failed",
    ]
)  # fmt: skip
DAYS = st.lists(
    st.tuples(st.sampled_from([MONDAY, TUESDAY]), NAMES, st.dictionaries(FIGURES, st.integers(1, 9), max_size=6)),
    max_size=12,
)
COLUMNS = (
    "asked done failed cancelled expired refused by_other promotions judged in_time in_time_asked in_time_share "
    "in_time_asked_share first_token_p50_ms first_token_p95_ms first_token_p99_ms tokens_in tokens_cached tokens_out "
    "untold queued_ms running_ms failed_by refused_by"
).split()
TOLD: list[tuple[date, By, dict[str, int]]] = [
    (MONDAY, By("ann", "big", "big", "big"), {"done/in_time/448": 90, "done/late/9216": 9, "tokens_in": 4_600_000}),
    (
        TUESDAY,
        By("ann", "small", "big", "small"),
        {"done/in_time/512": 1, "tokens_out": 12_340, "running_ms": 5_400_000},
    ),
    (MONDAY, By("ci", "big.batch", "big", "big"), {"done": 7, "untold": 2, "tokens_in": 900, "tokens_cached": 899}),
    (MONDAY, By("ann", "big", "big", "big"), {"promoted/small": 1, "failed/worker_lost/no_token": 1, "cancelled": 1}),
    (TUESDAY, By("ci", "big", "big", "big"), {"refused/lane_full": 11, "expired/no_token": 1}),
    (TUESDAY, By(NOBODY, NOBODY, NOBODY, NOBODY), {"refused/invalid_api_key": 3}),
]


def told(days: list[tuple[date, By, dict[str, int]]], *by: str, caller: str | None = None) -> dict[str, Any]:
    report = Report(by, caller=caller)
    for day, names, figures in days:
        for one in counts([(names, {figure.encode(): b"%d" % n for figure, n in figures.items()})]):
            report.count(day, one)
    return report.as_json(MONDAY, TUESDAY)


SUMMED = [name for name in COLUMNS if not name.endswith(("_share", "_by")) and not name.startswith("first_token")]


@given(DAYS, st.lists(st.sampled_from(BY), max_size=4, unique=True))
def test_rows_add_up_to_the_total_whatever_they_are_of(
    days: list[tuple[date, By, dict[str, int]]], by: list[str]
) -> None:
    """And the total is that of the counters: nothing is told twice, nothing is left out."""
    found = told(days, *by)
    for name in SUMMED:
        assert sum(row[name] for row in found["rows"]) == found["total"][name], name
    flat = [(figure, amount) for _, _, figures in days for figure, amount in figures.items()]
    ends = ("done", "failed", "cancelled", "expired", "refused")
    total = found["total"]
    for end in ends:
        assert total[end] == sum(n for figure, n in flat if figure.split("/")[0] == end), end
    assert total["asked"] == sum(total[end] for end in ends)
    for code, n in total["failed_by"].items():
        assert n == sum(a for figure, a in flat if figure.startswith(f"failed/{code}")), code
    assert total["promotions"] == sum(n for figure, n in flat if figure == "promoted/late")
    assert total["in_time_asked"] <= total["in_time"] <= total["judged"] <= total["asked"]


@given(DAYS)
def test_a_callers_report_is_its_row_of_everybodys(days: list[tuple[date, By, dict[str, int]]]) -> None:
    everybody = {row["caller"]: row for row in told(days, "caller")["rows"]}
    for name in ("ann", "ci", "nobody"):
        own = told(days, "caller", caller=name)
        assert own["rows"] == [everybody[name] for name in (name,) if name in everybody]
        assert {k: own["total"][k] for k in SUMMED} == {k: everybody.get(name, {}).get(k, 0) for k in SUMMED}


def test_jobs_stand_under_the_model_asked_for_and_tokens_under_the_one_that_served() -> None:
    big, small = told(TOLD, "model", caller="ann")["rows"]
    assert (big["model"], big["done"], big["by_other"], big["judged"], big["in_time"]) == ("big", 100, 1, 101, 91)
    assert (big["in_time_asked"], big["tokens_out"], big["running_ms"]) == (90, 0, 0)
    assert (small["model"], small["asked"], small["tokens_out"], small["running_ms"]) == ("small", 0, 12_340, 5_400_000)


def test_the_json_keeps_its_keys() -> None:
    found = told(TOLD, "day", "caller")
    assert list(found) == ["since", "until", "zone", "by", "caller", "first_token_error", "rows", "total"]
    assert (found["since"], found["until"], found["zone"]) == ("2026-11-23", "2026-11-24", "UTC")
    assert [list(row) for row in found["rows"]] == [["day", "caller", *COLUMNS]] * len(found["rows"])
    assert list(found["total"]) == list(told([], "lane")["total"]) == COLUMNS
    assert [(row["day"], row["caller"]) for row in found["rows"]] == [
        *(("2026-11-23", name) for name in ("ann", "ci")),
        *(("2026-11-24", name) for name in (NOBODY, "ann", "ci")),
    ]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("by", [(), ("caller",), BY])
def test_the_csv_keeps_its_columns_and_says_what_the_json_says(by: tuple[str, ...]) -> None:
    found = told(TOLD, *by)
    text = usage_csv(found)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.splitlines()[0] == ",".join(["since", "until", *BY, *COLUMNS])
    assert len(rows) == len(found["rows"])
    for row, said in zip(rows, found["rows"], strict=True):
        assert [row[name] for name in BY] == [said.get(name, "") for name in BY]
        assert {name: int(row[name]) for name in SUMMED} == {name: said[name] for name in SUMMED}
        assert row["refused_by"] == " ".join(f"{code}={n}" for code, n in said["refused_by"].items())


TABLE = """\
usage from 2026-11-23 to 2026-11-24 (days of UTC)
CALLER     ASKED  DONE  NOT DONE  REFUSED  PROMOTED  IN TIME  AS ASKED  FIRST TOKEN  PROMPT  CACHED  ANSWER  SLOT TIME
(unknown)      3     0         0        3         0        -         -            -       0       -       0          -
ann          102   100         2        0         1    90.0%     89.1%   432ms/8.7s    4.6M    0.0%   12.3k        90m
ci            19     7         1       11         0     0.0%      0.0%            -     900   99.8%       0          -
total        124   107         3       14         1    89.2%     88.2%   432ms/8.7s    4.6M    0.0%   12.3k        90m
note: 14 requests were refused: lane_full 11, invalid_api_key 3
note: 1 job was answered with an error: worker_lost 1
note: 1 job was told that the wait was in vain (`expired`)
note: 1 job was cancelled: by request, for a client that hung up, or with a revoked key
note: 1 job was answered by another model than the one asked for
note: 2 answers were counted without tokens: the runtime told none
"""


def test_the_table_to_the_letter() -> None:
    assert usage_table(told(TOLD, "caller")).splitlines() == TABLE.splitlines()


def test_the_table_of_nothing_and_of_several_names() -> None:
    head, total = usage_table(told([], "lane")).splitlines()[1:]
    assert head.split()[:2] == ["LANE", "ASKED"]
    assert total.split() == ["total", "0", "0", "0", "0", "0", "-", "-", "-", "0", "-", "0", "-"]
    lines = usage_table(told(TOLD, "caller", "lane", caller="ann")).splitlines()
    assert sum(line.startswith("note: a job stands under the lane where it ended") for line in lines) == 1
    assert lines[0].startswith("usage of ann from")
    assert lines[1].split()[:3] == ["CALLER", "LANE", "ASKED"]
    assert [line.split()[:3] for line in lines[2:4]] == [["ann", "big", "101"], ["ann", "small", "1"]]
    assert lines[4].split()[:3] == ["total", "102", "100"]


@pytest.mark.parametrize(
    ("figures", "by", "said"),
    [
        ({"done": 9, "promoted/small": 1}, ("lane",), True),  # it moved
        ({"done": 9}, ("lane", "day"), False),
        ({"done": 9, "promoted/small": 1}, ("model",), False),
    ],
)
def test_by_lane_the_table_says_where_jobs_stand_that_went_elsewhere(
    figures: dict[str, int], by: tuple[str, ...], said: bool
) -> None:
    """Under a model they stand where they asked, under a lane where they ended: the two tables seem to contradict."""
    text = usage_table(told([(MONDAY, By("ann", "big", "big", "big"), figures)], *by))
    assert ("one that moved or spilled into a fallback is not in the row of the lane that it asked for" in text) is said
    spilled = told([(MONDAY, By("ann", "small", "big", "small"), {"done": 1})], *by)
    assert ("note: a job stands under the lane where it ended" in usage_table(spilled)) is ("lane" in by)


def test_numbers_are_short_and_never_more_than_they_are() -> None:
    assert [count(n) for n in (0, 999, 9_999, 12_345, 999_999, 1_000_000, 4_600_000)] == [
        "0", "999", "9999", "12.3k", "999.9k", "1.0M", "4.6M",
    ]  # fmt: skip
