"""A worker's picture of its lanes: bounded, and an entry that was tried is not tried again."""

from broker.records import Waiting
from workers.picture import KEPT_BATCH, KEPT_EACH, KEPT_INTERACTIVE, SPENT_KEPT, LanePicture


def job(number: int, lane: str = "big", priority: str = "interactive", caller: str = "") -> Waiting:
    return Waiting(job=f"job{number}", lane=lane, entry=f"{number}-0", priority=priority, caller=caller)


def picture_of(*lanes: str) -> LanePicture:
    picture = LanePicture()
    picture.follow(lanes)
    return picture


def known(picture: LanePicture, *lanes: str) -> list[str]:
    return [waiting.job for waiting in picture.waiting(lanes or ("big",))]


def test_only_lanes_that_count_are_kept() -> None:
    picture = picture_of("big", "big.batch")
    picture.add(job(1))
    picture.add(job(2, "other"))
    picture.replace("other", [job(3, "other")])
    assert known(picture, "big", "other") == ["job1"]
    picture.follow(["other"])
    assert known(picture, "big", "other") == []
    assert picture.lanes() == ["other"]


def test_an_entry_that_was_tried_stays_away_until_it_is_said_to_wait() -> None:
    """The tail, a resync and a late message may all bring it back."""
    picture = picture_of("big")
    picture.add(job(1))
    picture.add(job(1))
    assert known(picture) == ["job1"]
    picture.spend(job(1))
    picture.add(job(1))
    picture.replace("big", [job(1), job(2)])
    assert known(picture) == ["job2"]
    picture.unspend(job(1))
    assert sorted(known(picture)) == ["job1", "job2"]


def test_a_job_that_comes_back_has_a_new_entry() -> None:
    picture = picture_of("big")
    picture.spend(job(1))
    picture.add(Waiting(job="job1", lane="big", entry="9-0"))
    assert known(picture) == ["job1"]


def test_the_same_entry_id_in_two_lanes_is_two_entries() -> None:
    picture = picture_of("big", "big.batch")
    picture.spend(job(1))
    picture.add(job(1, "big.batch", "batch"))
    assert known(picture, "big", "big.batch") == ["job1"]


def test_a_long_lane_is_cut_and_looked_at_again_when_it_runs_low() -> None:
    picture = picture_of("big", "big.batch")
    for number in range(KEPT_INTERACTIVE + 50):
        picture.add(job(number))
        picture.add(job(number, "big.batch", "batch"))
    assert (len(known(picture)), len(known(picture, "big.batch"))) == (KEPT_INTERACTIVE, KEPT_BATCH)
    assert picture.short() == []
    for number in range(KEPT_INTERACTIVE - KEPT_BATCH // 2 + 1):
        picture.spend(job(number))
    assert picture.short() == ["big"]
    picture.replace("big", [job(number) for number in range(KEPT_INTERACTIVE, KEPT_INTERACTIVE + 50)])
    assert picture.short() == []
    assert len(known(picture)) == 50


def test_what_was_tried_is_not_remembered_for_ever() -> None:
    picture = picture_of("big")
    for number in range(SPENT_KEPT + 10):
        picture.spend(job(number))
    assert len(picture._spent) == SPENT_KEPT
    picture.add(job(SPENT_KEPT + 5))
    assert known(picture) == []


def test_what_is_heard_while_a_lane_is_read_stays() -> None:
    """The tail may tell of an entry that the look under way is too old to have seen."""
    picture = picture_of("big")
    picture.add(job(1))
    picture.before_look("big")
    picture.add(job(3))
    picture.replace("big", [job(2)])
    assert known(picture) == ["job2", "job3"]


def test_whether_anyone_waits_in_some_lanes() -> None:
    picture = picture_of("big", "big.batch")
    assert not picture.anyone_waits(["big", "big.batch", "unknown"])
    picture.add(job(1, "big.batch", "batch"))
    assert picture.anyone_waits(["big", "big.batch"]) and not picture.anyone_waits(["big"])
    picture.spend(job(1, "big.batch", "batch"))
    assert not picture.anyone_waits(["big.batch"])


def test_a_flood_does_not_hide_who_came_after_it() -> None:
    """Or the caller that was served least would wait behind thousands of another's jobs."""
    picture = picture_of("big.batch")
    for number in range(500):
        picture.add(job(number, "big.batch", "batch", "bot"))
    for number in range(500, 510):
        picture.add(job(number, "big.batch", "batch", "late"))
    assert picture.callers(["big.batch"]) == {"batch": {"bot", "late"}}
    assert len(known(picture, "big.batch")) == KEPT_BATCH + KEPT_EACH
    for number in range(1_000, 2_000):
        picture.add(job(number, "big.batch", "batch", f"bot{number}"))
    assert len(known(picture, "big.batch")) == 2 * KEPT_BATCH


def test_what_was_heard_of_beyond_a_look_that_ended_early_stays() -> None:
    picture = picture_of("big")
    for number in (1, 2, 30):
        picture.add(job(number, caller="late" if number == 30 else "bot"))
    picture.replace("big", [job(2, caller="bot")], up_to="9-0")
    assert known(picture) == ["job2", "job30"]
    assert picture.short() == ["big"]
    picture.replace("big", [job(2, caller="bot")])
    assert known(picture) == ["job2"]
    assert picture.callers(["big"]) == {"interactive": {"bot"}}


def test_whose_jobs_wait() -> None:
    picture = picture_of("big", "big.batch")
    picture.add(job(1, caller="a"))
    picture.add(job(2, caller="a"))
    picture.add(job(3, caller="b"))
    picture.add(job(4, "big.batch", "batch", "c"))
    everywhere = ["big", "big.batch", "unknown"]
    assert picture.callers(everywhere) == {"interactive": {"a", "b"}, "batch": {"c"}}
    picture.spend(job(1, caller="a"))
    picture.spend(job(3, caller="b"))
    assert picture.callers(everywhere) == {"interactive": {"a"}, "batch": {"c"}}
    picture.spend(job(3, caller="b"))
    picture.unspend(job(3, caller="b"))
    picture.follow(["big"])
    assert picture.callers(everywhere) == {"interactive": {"a", "b"}}
