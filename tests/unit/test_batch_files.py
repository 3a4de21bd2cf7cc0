"""The files of a batch run: what a line is, what of an output can be believed after a kill, and whose file it is."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from api.batch_files import BadLine, Requests, Written
from api.exit_codes import UNWRITTEN, USAGE, Failed
from tests.support.batch_command import read


def request(custom_id: object = "a", **more: object) -> str:
    known = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": {"model": "big"}}
    return json.dumps(known | more)


@contextmanager
def requests_of(tmp_path: Path, *lines: str) -> Iterator[Requests]:
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(lines))
    with Requests(file) as requests:
        yield requests


def ids_of(tmp_path: Path, *lines: str) -> list[str]:
    with requests_of(tmp_path, *lines) as requests:
        return [line.id for line in requests.lines]


def test_a_line_is_known_by_what_it_says(tmp_path: Path) -> None:
    """Wherever it stands; the same line twice is two requests."""
    lines = (request("a"), "", request("b"), request("b") + "\r")
    with requests_of(tmp_path, *lines) as requests:
        assert [line.number for line in requests.lines] == [1, 3, 4]
    ids = ids_of(tmp_path, *lines)
    assert len(set(ids)) == 3
    assert ids_of(tmp_path, request("b"), request("b"), request("a")) == [ids[1], ids[2], ids[0]]
    assert ids_of(tmp_path, request("a", body={"model": "small"}))[0] not in ids


def test_a_request_is_read_where_it_stands(tmp_path: Path) -> None:
    lines = (request("a", body={"says": "ü"}), request("b", method=None, url="/v1/responses"))
    with requests_of(tmp_path, *lines) as requests:
        one, other = (requests.read(line) for line in requests.lines)
    assert (one.custom_id, one.url, one.body) == ("a", "/v1/chat/completions", {"says": "ü"})
    assert (other.custom_id, other.url) == ("b", "/v1/responses")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no JSON"), ("[1]", "no object"), ("[" * 100_000, "no JSON"), (request(""), "no custom_id"),
        (request(7), "no custom_id"), (request(method="GET"), "method"), (request(url="chat"), "no url"),
        (request(body="x"), "no body"), ("\x00\x00", "no JSON"),
    ],
)  # fmt: skip
def test_a_bad_line_says_which_it_is_and_why(tmp_path: Path, line: str, words: str) -> None:
    with requests_of(tmp_path, request("good"), line) as requests:
        with pytest.raises(BadLine, match=f"line 2 .*{words}"):
            requests.read(requests.lines[1])


def test_a_torn_line_is_cut_off_and_whole_ones_are_known(tmp_path: Path) -> None:
    """Wherever the kill came: at each byte of the last line."""
    file = tmp_path / "out.jsonl"
    with Written(file) as out:
        out.add("batch_req_1", {"custom_id": "a", "response": {"body": "ü\ud800"}})
        out.add("batch_req_2", {"custom_id": "b"})
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole)):
        file.write_bytes(whole[:length])
        with Written(file) as out:
            assert out.ids == {"batch_req_1"}
        assert file.read_bytes() == whole[:first]
    file.write_bytes(whole)
    with Written(file) as out:
        assert out.ids == {"batch_req_1", "batch_req_2"}
        out.add("batch_req_3", {})
    assert [json.loads(line)["id"][-1] for line in file.read_text().splitlines()] == ["1", "2", "3"]


@pytest.mark.parametrize("text", ["a diary\n", "a diary", '{"id":"other"}\n', '{"id":"batch_req_1"}\nmine\n'])
def test_somebody_elses_file_is_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text(text)
    with pytest.raises(Failed, match="something else") as failure:
        Written(file)
    assert failure.value.code == USAGE and file.read_text() == text


def test_two_runs_never_write_the_same_file(tmp_path: Path) -> None:
    with Written(tmp_path / "out.jsonl"), pytest.raises(Failed, match="Another"):
        Written(tmp_path / "out.jsonl")
    with Written(tmp_path / "out.jsonl"):
        pass


def test_a_file_without_a_line_goes_if_it_may(tmp_path: Path) -> None:
    with Written(tmp_path / "err.jsonl", temporary=True):
        pass
    assert not (tmp_path / "err.jsonl").exists()
    with Written(tmp_path / "err.jsonl", temporary=True) as errors:
        errors.add("batch_req_1", {"response": {"request_id": "j1"}})
    assert (tmp_path / "err.jsonl").exists()
    with Written(tmp_path / "err.jsonl", temporary=True) as errors:
        errors.take_away({"batch_req_1", "batch_req_2"})
        assert (tmp_path / "err.jsonl").read_text(), "a kill now would lose nothing"
    assert list(tmp_path.iterdir()) == []


def failures(file: Path) -> list[tuple[str, str | None]]:
    return [(told["id"][-1], (told["response"] or {}).get("request_id")) for told in read(file)]


def test_an_outcome_counts_instead_of_the_one_before(tmp_path: Path) -> None:
    """Both stand there after a kill; at a run's end each line is there once, in a file of the same mode."""
    file = tmp_path / "err.jsonl"
    with Written(file) as errors:
        for number in (1, 2, 3):
            errors.add(f"batch_req_{number}", {"response": {"request_id": f"j{number}"}})
        errors.add("batch_req_4", {"response": None})
    file.chmod(0o640)
    with Written(file) as errors:
        assert errors.jobs() == {"batch_req_1": "j1", "batch_req_2": "j2", "batch_req_3": "j3", "batch_req_4": ""}
        errors.take_away({"batch_req_2"})
        errors.add("batch_req_1", {"response": {"request_id": "j9"}})
        killed = file.read_bytes()
        assert errors.ids == {"batch_req_1", "batch_req_3", "batch_req_4"}
    whole = [("3", "j3"), ("4", None), ("1", "j9")]
    assert failures(file) == whole and file.stat().st_mode & 0o777 == 0o640 and list(tmp_path.iterdir()) == [file]
    file.write_bytes(killed)
    assert failures(file) == [("1", "j1"), ("2", "j2"), ("3", "j3"), ("4", None), ("1", "j9")]
    with Written(file) as errors:
        assert errors.jobs()["batch_req_1"] == "j9"
        errors.take_away({"batch_req_2"})
    assert failures(file) == whole


def test_a_file_that_cannot_be_made_anew_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "err.jsonl"
    with Written(file) as errors:
        errors.add("batch_req_1", {})
        errors.add("batch_req_2", {})
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Failed, match="No space") as failure, Written(file) as errors:
        errors.take_away({"batch_req_1"})
    assert failure.value.code == UNWRITTEN and file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_file_that_takes_no_more_keeps_whole_lines(tmp_path: Path) -> None:
    """What came of the line that it did not take is no line: another one may still find room behind it."""
    file = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Written(file) as out:
        out.add("batch_req_1", {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            with pytest.raises(Failed, match="can't be written: File too large") as failure:
                out.add("batch_req_2", {"body": "x" * 200})
            out.add("batch_req_3", {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert failure.value.code == UNWRITTEN and out.ids == {"batch_req_1", "batch_req_3"}
    assert [told["id"][-1] for told in read(file)] == ["1", "3"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    held = os.open(tmp_path / "pipe", os.O_RDWR)
    try:
        for refused in (lambda: Written(tmp_path / "pipe"), lambda: Requests(tmp_path / "pipe")):
            with pytest.raises(Failed, match="no file on a disk"):
                refused()
    finally:
        os.close(held)
    for use in (lambda: Written(tmp_path / "no" / "where"), lambda: Requests(tmp_path / "nothing")):
        with pytest.raises(Failed, match="can't be"):
            use()
