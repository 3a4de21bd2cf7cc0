"""A form with a file in it, read as it comes: nobody holds more of the file than what came last."""

import re

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from broker import errors

FIELDS_MAX = 16
FIELD_BYTES_MAX = 1 << 10
NAME_MAX = 255
HEADERS_MAX = 8
HEADER_BYTES_MAX = 4 << 10

_UNFIT = re.compile(r"[\x00-\x1f\x7f/\\]")


class Form:
    """Reads `multipart/form-data` with one file, called `file`, and short fields."""

    def __init__(self, content_type: str) -> None:
        """Raises BadRequest where that is not what comes."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise errors.BadRequest("send the file as multipart/form-data, with its boundary", "Content-Type")
        self.fields: dict[str, str] = {}
        self.filename = ""
        self.whole = False
        self.has_file = False
        self._file: list[bytes] = []  # what came of it since the last `feed`
        self._name = b""
        self._header = b""
        self._value = b""
        self._disposition = ""
        self._parts = 0
        self._field = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._on_header,
                    "on_header_value": self._on_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._end,
                    "on_end": self._on_end,
                },
                max_header_count=HEADERS_MAX,
                max_header_size=HEADER_BYTES_MAX,
            )
        except FormParserError:
            raise errors.BadRequest("the form's boundary is too long", "Content-Type") from None

    def feed(self, data: bytes) -> bytes:
        """Takes what came, gives what is of the file; raises BadRequest."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise errors.BadRequest("the body is no form of multipart/form-data") from None
        found, self._file = self._file, []
        return found[0] if len(found) == 1 else b"".join(found)

    def _begin(self) -> None:
        self._disposition, self._header, self._value = "", b"", b""
        self._parts += 1
        if self._parts > FIELDS_MAX:
            raise errors.BadRequest(f"the form has more than {FIELDS_MAX} fields")

    def _on_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value.decode("utf-8", "replace")
        self._header, self._value = b"", b""

    def _on_headers(self) -> None:
        # its parser takes latin-1 only: what a client wrote in UTF-8 goes through it as its bytes
        told = self._disposition.encode("utf-8", "replace").decode("latin-1")
        _, options = parse_options_header(told)
        self._name, filename = options.get(b"name", b""), options.get(b"filename")
        self._field.clear()
        if self._name != b"file":
            return
        if self.has_file:
            raise errors.BadRequest("the form holds more than one file", "file")
        self.has_file = True
        self.filename = _UNFIT.sub("_", (filename or b"").decode("utf-8", "replace"))[-NAME_MAX:]

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == b"file":
            self._file.append(data[start:end])
            return
        self._field += data[start:end]
        if len(self._field) > FIELD_BYTES_MAX:
            raise errors.BadRequest(f"a field of the form holds more than {FIELD_BYTES_MAX} bytes")

    def _end(self) -> None:
        if self._name != b"file":
            self.fields[self._name.decode("utf-8", "replace")] = self._field.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self.whole = True
