"""A form with a file, read in pieces of any size: what comes out is what went in, and nonsense is refused."""

import pytest

from api.form import FIELD_BYTES_MAX, FIELDS_MAX, Form
from broker.errors import BadRequest

KIND = "multipart/form-data; boundary=xYz"
CONTENT = b'{"custom_id": "1"}\r\n--xY not the boundary\r\n{"custom_id": "2"}\n'


def part(name: str, value: bytes, *, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    head = f'--xYz\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--xYz--\r\n"


def read(sent: bytes, *, step: int) -> tuple[Form, bytes]:
    form = Form(KIND)
    return form, b"".join(form.feed(sent[at : at + step]) for at in range(0, len(sent), step))


@pytest.mark.parametrize("step", [1, 3, 7, 64, 10_000])
@pytest.mark.parametrize("file_first", [True, False])
def test_the_file_and_the_fields_come_out_however_they_are_cut(step: int, file_first: bool) -> None:
    parts = [part("file", CONTENT, filename="in.jsonl"), part("purpose", b"batch")]
    form, content = read(body(*(parts if file_first else parts[::-1])), step=step)
    assert content == CONTENT
    assert form.fields == {"purpose": "batch"}
    assert form.filename == "in.jsonl"
    assert form.whole and form.has_file


def test_a_form_that_breaks_off_is_not_whole() -> None:
    form, content = read(body(part("purpose", b"batch"), part("file", CONTENT, filename="x"))[:-4], step=50)
    assert content == CONTENT
    assert not form.whole


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("grüße.jsonl", "grüße.jsonl"),
        ("a\x00b", "a_b"),
        ("x" * 300, "x" * 255),
    ],
)
def test_a_filename_is_a_name_and_no_path(said: str, kept: str) -> None:
    form, _ = read(body(part("file", CONTENT, filename=said)), step=4096)
    assert form.filename == kept


@pytest.mark.parametrize(
    "kind", ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 300]
)
def test_what_is_no_form_is_refused_before_it_is_read(kind: str) -> None:
    with pytest.raises(BadRequest):
        Form(kind)


@pytest.mark.parametrize(
    "sent",
    [
        b"no boundary at all",
        body(part("file", b"1", filename="a"), part("file", b"2", filename="b")),
        body(part("note", b"x" * (FIELD_BYTES_MAX + 1))),
        body(*(part(f"f{n}", b"x") for n in range(FIELDS_MAX + 1))),
        b"--xYz\r\n" + b"X-Header: y\r\n" * 20 + b"\r\nvalue\r\n--xYz--\r\n",
        b"--xYz\r\nX-Header: " + b"y" * 10_000 + b"\r\n\r\nvalue\r\n--xYz--\r\n",
    ],
    ids=["nonsense", "two files", "a long field", "many fields", "many headers", "a long header"],
)
def test_a_form_that_holds_too_much_is_refused(sent: bytes) -> None:
    with pytest.raises(BadRequest):
        read(sent, step=512)
