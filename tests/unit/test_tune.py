"""`gateway tune`: what it proposes in which situation, with which figures, and that a policy can take it."""

import json
import re
from dataclasses import replace
from datetime import date
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from api.tune_text import tune_text
from broker.figures import By, counts
from broker.policy import Policy
from broker.status import HostStatus, ModelStatus
from broker.tune import CallerSeen, LaneSeen, ModelSeen, Seen, Tuning, propose
from broker.tune_facts import Tally, seen

GIB = 2**30
BIG = ModelSeen(
    name="big",
    max_concurrent=2,
    load_ms=20_000,
    first_token_ms=1_000,
    service_ms=4_000,
    footprint_bytes=20 * GIB,
    headroom_bytes=8 * GIB,
)
LANE = LaneSeen(
    name="big",
    model="big",
    max_queue=6,
    cold_start_budget_ms=25_000,
    max_wait_ms=120_000,
    fallback="small",
    asked=200,
    judged=190,
    first_token_p95_ms=9_000,
)
POLICY = """
models:
  big: { backend: ollama, model: "x:32b", maxConcurrent: 2, maxQueue: 6, fallback: small, keepWarm: true }
  small: { backend: ollama, model: "x:7b", maxConcurrent: 4, maxQueue: 12 }
routing:
  - { match: { lane: "high-context" }, target: big }
"""


def judge(lane: LaneSeen = LANE, model: ModelSeen = BIG) -> Tuning:
    return propose(Seen(models=(model,), lanes=(lane,), names=frozenset({"big", "small", "big.batch"})))


def merged(text: str, fragment: dict[str, Any]) -> dict[str, Any]:
    """What a person does with the fragment: mappings are merged, rules stand above the others."""

    def into(there: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        return there | {
            key: into(there.get(key) or {}, value) if isinstance(value, dict) else value for key, value in new.items()
        }

    told: dict[str, Any] = yaml.safe_load(text)
    rules = [*fragment.get("routing", []), *told.get("routing", [])]
    return into(told, {key: value for key, value in fragment.items() if key != "routing"}) | {"routing": rules}


def test_nothing_is_wrong_so_nothing_is_proposed() -> None:
    found = judge()
    assert found.proposals == () and found.advice == () and found.fragment() == {}
    [peaks] = found.unknown
    assert "only how many in a day" in peaks


@pytest.mark.parametrize(
    ("what", "lane", "model", "proposed", "figures"),
    [
        (
            "requests are refused though a place would come in time",
            {"full": 11}, {},
            {"models": {"big": {"maxQueue": 12}}},
            ["11 of 200 requests for big found no place", "place 12", "24 s", "4.0 s a job, 2 slots", "25 s", "small"],
        ),
        (
            "… but no further than the places that come in time",
            {"full": 11, "max_queue": 10}, {},
            {"models": {"big": {"maxQueue": 12}}},
            ["place 12"],
        ),
        (
            "… and without a fallback up to where a job is given up",
            {"full": 11, "max_queue": 40, "fallback": ""}, {},
            {"models": {"big": {"maxQueue": 60}}},
            ["120 s", "is given up"],
        ),
        (
            "a lane without a place gets one",
            {"full": 30, "max_queue": 0}, {},
            {"models": {"big": {"maxQueue": 1}}},
            ["30 of 200"],
        ),
        (
            "places whose turn comes too late serve nobody",
            {"late": 14, "max_queue": 12}, {"service_ms": 20_000},
            {"models": {"big": {"maxQueue": 2}}},
            ["The last of 12 places", "120 s", "20 s a job", "14 of 200"],
        ),
        (
            "a lane of `lanes:` is changed there",
            {"full": 11, "name": "fast"}, {},
            {"lanes": {"fast": {"maxQueue": 12}}},
            ["requests for fast"],
        ),
        (
            "and so is what `lanes:` says of a model's own lane",
            {"full": 11, "in_lanes": frozenset({"maxQueue"})}, {},
            {"lanes": {"big": {"maxQueue": 12}}},
            ["requests for big"],
        ),
        (
            "a load is longer than the budget",
            {"moved": 14, "cold_start_budget_ms": 15_000, "max_queue": 4}, {},
            {"models": {"big": {"coldStartBudgetMs": 26_000}}},
            ["loads in 20 s", "takes 1.0 s itself to a first token", "within 15 s", "14 of 200 requests moved to small",
             "or because it was busy", "is not counted"],
        ),
        (
            "… a model that is quick itself needs the load and little else, whatever its clients waited",
            {"moved": 14, "cold_start_budget_ms": 7_000, "max_queue": 3, "first_token_p95_ms": 40_000},
            {"load_ms": 8_200, "first_token_ms": 8.4},
            {"models": {"big": {"coldStartBudgetMs": 10_000}}},
            ["loads in 8.2 s and then takes 8 ms itself to a first token"],
        ),
        (
            "… and where no worker has measured a first token, the load alone",
            {"moved": 14, "cold_start_budget_ms": 7_000, "max_queue": 3}, {"load_ms": 8_200, "first_token_ms": 0},
            {"models": {"big": {"coldStartBudgetMs": 10_000}}},
            ["loads in 8.2 s and then gives a first token, after a time that no worker has measured yet"],
        ),
        (
            "a budget is far longer than what is needed",
            {"cold_start_budget_ms": 90_000}, {},
            {"models": {"big": {"coldStartBudgetMs": 32_000}}},
            ["190 of 190", "9.0 s", "20 s", "32 s"],
        ),
        (
            "a runtime runs fewer than it is given",
            {}, {"max_concurrent": 4, "parallel": 2},
            {"models": {"big": {"maxConcurrent": 2}}},
            ["run 2 at once and not 4"],
        ),
        (
            "places do not help, and memory is left",
            {"full": 30, "max_queue": 12}, {},
            {"models": {"big": {"maxConcurrent": 3}}},
            ["15 % of 200", "8.0 GiB are free beside the 20.0 GiB"],
        ),
    ],
)  # fmt: skip
def test_what_is_proposed(
    what: str, lane: dict[str, Any], model: dict[str, Any], proposed: dict[str, Any], figures: list[str]
) -> None:
    found = judge(replace(LANE, **lane), replace(BIG, **model))
    assert found.fragment() == proposed, what
    [one] = found.proposals
    assert [figure for figure in figures if figure not in one.why] == [], one.why
    assert one.why.endswith(".") and one.why.count(". ") == 0, "one sentence"
    assert one.now != one.proposed


@pytest.mark.parametrize(
    ("lane", "model"),
    [
        ({"full": 2}, {}),  # two refusals in two days are nobody's trouble
        ({"full": 11, "max_queue": 12}, {"headroom_bytes": GIB}),  # no place helps, and no memory is left
        ({"moved": 14, "max_queue": 4}, {}),  # the budget holds a load: they moved for another reason
        ({"moved": 14, "max_queue": 0}, {"load_ms": 180_000}),  # nobody should wait so long
        ({"cold_start_budget_ms": 90_000, "late": 9}, {}),  # not all came in time, so it is not too long
        ({"cold_start_budget_ms": 90_000, "judged": 30}, {}),  # too few to be sure
        ({"cold_start_budget_ms": 90_000, "fallback": ""}, {}),  # it moves nobody
    ],
)
def test_what_is_not_changed(lane: dict[str, Any], model: dict[str, Any]) -> None:
    found = judge(replace(LANE, **lane), replace(BIG, **model))
    assert [one for one in found.proposals if one.path[-1] != "maxConcurrent"] == []


COLD = replace(LANE, asked=100, moved=20, max_queue=16, cold_start_budget_ms=5_000)
SLOW = replace(BIG, max_concurrent=1, service_ms=8_000)


def test_a_queue_is_not_shortened_for_cold_starts() -> None:
    """They may have moved because the model was cold, and then no place would have been in time for them."""
    assert judge(COLD, SLOW).fragment() == {"models": {"big": {"coldStartBudgetMs": 26_000}}}
    found = judge(COLD, replace(SLOW, load_ms=90_000))
    assert found.proposals == ()
    [sentence] = found.advice
    assert "90 s" in sentence and "5.0 s" in sentence and "20 % of 100" in sentence and "keepWarm" in sentence
    assert "how many because it was cold, and how many because it was busy, is not counted" in sentence


def test_who_is_given_up_before_a_load_was_no_victim_of_the_queue_either() -> None:
    lane = replace(COLD, moved=0, expired=20, fallback="", max_wait_ms=10_000)
    found = judge(lane, SLOW)
    assert found.proposals == () and "keepWarm" in found.advice[0]


@pytest.mark.parametrize(
    ("lane", "model", "proposed"),
    [
        # seven turns fit into the 14 s that are proposed, so no place is added
        ({"asked": 1_000, "full": 20, "judged": 900, "cold_start_budget_ms": 40_000, "max_queue": 8},
         {"load_ms": 5_000}, {"coldStartBudgetMs": 14_000}),
        # … and where more fit, no more than those
        ({"asked": 1_000, "full": 20, "judged": 900, "cold_start_budget_ms": 40_000, "max_queue": 5},
         {"load_ms": 5_000}, {"coldStartBudgetMs": 14_000, "maxQueue": 7}),
        # a budget that is to hold a load gives time for more places
        ({"full": 11, "moved": 14, "cold_start_budget_ms": 10_000}, {},
         {"coldStartBudgetMs": 26_000, "maxQueue": 12}),
    ],
)  # fmt: skip
def test_places_are_judged_by_the_budget_that_is_proposed(
    lane: dict[str, Any], model: dict[str, Any], proposed: dict[str, int]
) -> None:
    found = judge(replace(LANE, **lane), replace(BIG, **model))
    assert found.fragment() == {"models": {"big": proposed}}
    for one in found.proposals:
        if one.path[-1] == "maxQueue":
            assert f"{proposed['coldStartBudgetMs'] // 1000} s (as proposed)" in one.why


def test_what_no_number_mends_is_said() -> None:
    [sentence] = judge(replace(LANE, full=30, max_queue=12), replace(BIG, headroom_bytes=GIB)).advice
    assert "a second host would help" in sentence and "1.0 GiB" in sentence
    [sentence] = judge(replace(LANE, full=30, max_queue=12), replace(BIG, parallel=2)).advice
    assert "another model or host" in sentence
    [sentence] = judge(replace(LANE, full=30, max_queue=12), replace(BIG, footprint_bytes=0)).advice
    assert "cannot be said before" in sentence


@pytest.mark.parametrize(
    ("lane", "model", "words"),
    [
        ({"asked": 0}, {}, "Nobody asked for big"),
        ({"asked": 7, "full": 7}, {}, "Only 7 requests for big are counted, too few"),
        ({}, {"service_ms": 0}, "How long a job of big holds a slot is not learned"),
        ({}, {"load_ms": 0}, "No worker has loaded big yet"),
        ({}, {"hosts": 0}, "No live host serves big"),
        ({"fallback": ""}, {}, "big has no fallback that waiting jobs move to"),
    ],
)
def test_what_is_not_known_is_said(lane: dict[str, Any], model: dict[str, Any], words: str) -> None:
    found = judge(replace(LANE, **lane), replace(BIG, **model))
    assert found.proposals == () and found.unknown[0].startswith(words)


HOG = {
    "ann": CallerSeen(done=80, running_ms=160_000),
    "bob": CallerSeen(done=60, running_ms=120_000),
    "CI.bot": CallerSeen(done=50, running_ms=2_000_000),
}


def test_a_caller_in_the_others_way_gets_a_lane_behind_theirs() -> None:
    lane = replace(LANE, callers=HOG, late=15, max_queue=4, names=("high-context",))
    found = judge(lane)
    assert found.fragment() == {
        "lanes": {"big-ci-bot": {"target": "big", "priority": "batch"}},
        "routing": [
            {"match": {"lane": "big", "caller": "CI.bot"}, "target": "big-ci-bot"},
            {"match": {"lane": "high-context", "caller": "CI.bot"}, "target": "big-ci-bot"},
        ],
    }
    why = found.proposals[0].why
    assert "CI.bot took 88 % of the slot time of big, 40 s a job where the others took 2.0 s" in why
    policy = Policy.parse(yaml.safe_dump(merged(POLICY, found.fragment()), sort_keys=False))
    for asked in ("big", "high-context"):
        routed = {
            who: policy.route(asked, caller=who, endpoint="/v1/chat/completions", prompt_tokens=9).name
            for who in ("CI.bot", "ann")
        }
        assert routed == {"CI.bot": "big-ci-bot", "ann": "big"}
    assert policy.all_lanes()["big-ci-bot"].priority == "batch"


@pytest.mark.parametrize(
    "changes",
    [
        {"late": 0},  # it hurts nobody
        {"callers": {"CI.bot": HOG["CI.bot"]}},  # it is alone
        {"callers": HOG | {"CI.bot": CallerSeen(done=1000, running_ms=2_000_000)}},  # many jobs, none long
        {"callers": HOG | {"CI.bot": CallerSeen(done=50, running_ms=250_000)}},  # it took less than half
    ],
)
def test_who_is_in_nobodys_way_stays(changes: dict[str, Any]) -> None:
    lane = replace(LANE, **({"callers": HOG, "late": 15, "max_queue": 4} | changes))
    assert "lanes" not in judge(lane).fragment()


def test_a_new_lanes_name_is_not_taken() -> None:
    lane = replace(LANE, callers=HOG, late=15, max_queue=4)
    found = propose(Seen(models=(BIG,), lanes=(lane,), names=frozenset({"big", "big-ci-bot"})))
    assert list(found.fragment()["lanes"]) == ["big-ci-bot-2"]


# --- from counters to a policy that can be applied ---------------------------------------------------------------

SHOWN = {
    "big": ModelStatus(
        name="big", hosts=("gpu1", "gpu2"), load_ms=20_000, footprint_bytes=20 * GIB, parallel=0, state="warm",
        first_token_ms=90, first_tokens_ms=(7, 8, 90),
    )
}  # fmt: skip
HOSTS = {"gpu1": HostStatus(name="gpu1", memory_headroom=8 * GIB), "gpu2": HostStatus(name="gpu2")}


def tally(*days: tuple[By, dict[str, int]]) -> Tally:
    found = Tally()
    for by, figures in days:
        for one in counts([(by, {name.encode(): b"%d" % amount for name, amount in figures.items()})]):
            found.count(date(2026, 11, 28), one)
    return found


def test_a_moved_job_counts_for_the_lane_that_it_asked_for() -> None:
    counted = tally(
        (By("ann", "big", "big", "big"), {"done/in_time/448": 30, "promoted/small": 4, "running_ms": 90_000}),
        (By("ann", "small", "big", "small"), {"done/late/30720": 4, "running_ms": 4_000}),
        (By("ci", "big", "big", "big"), {"refused/lane_full": 3, "refused/caller_share": 1, "expired/no_token": 2}),
        (By("-", "-", "-", "-"), {"refused/invalid_api_key": 9}),
    )
    found = seen(Policy.parse(POLICY), counted, shown=SHOWN, hosts=HOSTS, service_ms={"big": 3_000})
    lanes = {lane.name: lane for lane in found.lanes}
    assert lanes.keys() == {"big", "small"}, "batch lanes are not judged"
    big, small = lanes["big"], lanes["small"]
    assert (big.asked, big.full, big.moved, big.expired, big.judged, big.late) == (40, 3, 4, 2, 36, 4)
    assert (small.asked, small.late, small.callers["ann"].done) == (0, 0, 4)
    assert big.callers["ann"] == CallerSeen(done=30, running_ms=90_000) and big.names == ("high-context",)
    assert (big.fallback, big.unserved) == ("small", 6)
    model = found.models[0]
    assert (model.hosts, model.slots, model.service_ms) == (1, 2, 3_000), "one replica, whatever serves it"
    assert model.headroom_bytes == 0, "the least of both hosts"
    assert model.first_token_ms == 8, "the worker's own, and not what clients waited"
    told = {"big": replace(SHOWN["big"], first_tokens_ms=())}
    found = seen(Policy.parse(POLICY), counted, shown=told, hosts=HOSTS, service_ms={})
    assert found.models[0].first_token_ms == 90, "an api that has just begun has seen none yet"


@pytest.mark.parametrize(
    ("lane", "mixed_with"),
    [
        ("{ target: big, fallback: small }", ("fast",)),
        ("{ target: big, fallback: null }", ()),  # none of its jobs moves
        ("{ target: small, fallback: null }", ()),
    ],
)
def test_a_model_with_two_lanes_shortens_none_for_the_others_moves(lane: str, mixed_with: tuple[str, ...]) -> None:
    """A job that moved is counted under the model that it asked for, whichever of its lanes that was."""
    counted = tally(
        (By("ann", "big", "big", "big"), {"done/in_time/448": 100}),
        (By("ann", "small", "big", "small"), {"done/late/30720": 40}),  # out of fast
    )
    text = f"{POLICY}lanes:\n  fast: {lane}\n"
    facts = seen(Policy.parse(text), counted, shown=SHOWN, hosts=HOSTS, service_ms={"big": 40_000})
    assert {lane.name: lane.mixed_with for lane in facts.lanes}["big"] == mixed_with
    found = propose(facts)
    assert ("maxQueue" in found.fragment().get("models", {}).get("big", {})) is not bool(mixed_with)
    said = [sentence for sentence in found.unknown if "What moved out of fast" in sentence]
    assert len(said) == len(mixed_with)


def test_a_remote_fallback_takes_nobody_who_waits() -> None:
    far = POLICY.replace("backend: ollama, model: \"x:7b\"", "backend: openai, url: \"https://x.example\", model: y, "
                         "trust: remote, apiKeyEnv: KEY")  # fmt: skip
    found = seen(Policy.parse(far), tally(), shown={}, hosts={}, service_ms={})
    assert {lane.name: lane.fallback for lane in found.lanes} == {"big": "", "small": ""}


NUMBERS = st.integers(0, 400)
LANES = st.builds(
    replace,
    st.just(LANE),
    asked=st.integers(0, 5_000),
    full=NUMBERS,
    moved=NUMBERS,
    expired=NUMBERS,
    judged=NUMBERS,
    late=NUMBERS,
    max_queue=st.integers(0, 100_000),
    cold_start_budget_ms=st.integers(0, 200_000),
    max_wait_ms=st.integers(1, 400_000),
    fallback=st.sampled_from(["", "small"]),
    names=st.sampled_from([(), ("high-context",)]),
    callers=st.dictionaries(
        st.sampled_from(["ann", "CI", "a.batch", "null", "x: y", "#1"]),
        st.builds(CallerSeen, done=NUMBERS, running_ms=st.integers(0, 10**7)),
    ),
)
MODELS = st.builds(
    replace,
    st.just(BIG),
    max_concurrent=st.integers(1, 1024),
    hosts=st.integers(0, 9),
    parallel=st.integers(0, 9),
    load_ms=st.floats(0, 300_000),
    first_token_ms=st.floats(0, 60_000),
    service_ms=st.floats(0, 300_000),
    headroom_bytes=st.integers(0, 10**11),
)


@settings(max_examples=60)
@given(LANES, MODELS)
def test_whatever_is_proposed_the_text_is_yaml_that_a_policy_takes(lane: LaneSeen, model: ModelSeen) -> None:
    found = judge(lane, model)
    text = tune_text(as_told(found))
    fragment = yaml.safe_load(text) or {}
    assert fragment == found.fragment() == json.loads(json.dumps(found.fragment()))
    Policy.parse(yaml.safe_dump(merged(POLICY, fragment), sort_keys=False))
    assert len(found.fragment()) <= len(found.proposals)
    for sentence in [*(one.why for one in found.proposals), *found.advice, *found.unknown]:
        assert bare(sentence) in bare(text)


def bare(text: str) -> str:
    """Without what breaks lines and begins comments."""
    return re.sub(r"[\s#-]", "", text)


def as_told(found: Tuning) -> dict[str, Any]:
    return {
        "since": "2026-11-27",
        "until": "2026-11-28",
        "zone": "UTC",
        "policy_version": 3,
        "proposals": [one.as_json() for one in found.proposals],
        "advice": list(found.advice),
        "unknown": list(found.unknown),
        "fragment": found.fragment(),
    }


def test_the_text_has_each_change_under_its_reason() -> None:
    lane = replace(LANE, full=11, callers=HOG)
    assert tune_text(as_told(judge(lane))) == TEXT


TEXT = """# From 2026-11-27 to 2026-11-28 (days of UTC), for version 3 of the policy. Nothing is applied.
models:
  big:
    # 11 of 200 requests for big found no place, though place 12 would have its turn after 24 s (4.0 s a job,
    # 2 slots), within the 25 s after which a job moves to small.
    maxQueue: 12  # now 6
lanes:
  big-ci-bot:
    # CI.bot took 88 % of the slot time of big, 40 s a job where the others took 2.0 s, while 11 of 200
    # requests were refused, late or moved: in a lane of batch priority its jobs let people go first.
    target: big
    priority: batch
routing:
  # It leads the requests of CI.bot for big there, and must stand above the other rules.
  - match: {lane: big, caller: CI.bot}
    target: big-ci-bot
# Not known:
# - How many requests came at the same moment is not counted, only how many in a day: these proposals go by
#   what was refused, late or moved, and a day like no other may need others."""
