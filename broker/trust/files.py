"""Recognises a file that somebody put into a plain message, as agents, editors and people do. Pure.

A net with stated meshes: code that was pasted without a fence, and without anything that says where it is from, passes
as text.
"""

import re

FENCE_LINES = 20
"""A fenced block of so many lines is a file, whatever stands above it."""

NUMBERED_LINES = 5
"""So many numbered lines in a row are a listing."""

_TAGS = (
    "file file_content file_contents file_path file_text document documents document_content source codebase "
    "open_file open_files current_file currently_open_file attached_file attached_files environment_details "
    "context additional_data selection code_selection git_diff git_status repo_map"
).split()
_tag = re.compile(rf"<(?:{'|'.join(_TAGS)})(?:\s[^<>]{{0,300}})?>", re.IGNORECASE).search
_diff = re.compile(
    r"^(?:diff --git \S|@@ -\d+(?:,\d+)? \+\d+|\*\*\* (?:Begin Patch|Update File|Add File))", re.MULTILINE
).search
_says = re.compile(
    r"^[ \t>*#/-]{0,8}(?:file|filename|file name|filepath|file path|path)"
    r"[*_`]{0,3}\s?:[*_`\s]{0,5}[\w./\\~-]{1,200}\.\w{1,10}\b",
    re.IGNORECASE | re.MULTILINE,
).search
_numbered = re.compile(rf"(?:^[ \t]{{0,8}}\d{{1,6}}[ \t]?[|:\t→][^\n]*\n){{{NUMBERED_LINES}}}", re.MULTILINE).search
_fence = re.compile(r"^[ \t>]{0,8}(`{3,}|~{3,})([^\n`]*)$", re.MULTILINE)
_path = re.compile(r"[\w.@~+-]*(?:[/\\][\w.@+ -]{1,100}){1,20}|[\w@+-]{1,100}\.[A-Za-z]\w{0,9}")
_comment = re.compile(r"^\s*(?:#|//|--|;|/\*|<!--)\s*(\S{1,200})")


def file_in(text: str) -> str:
    """Says by what a file shows in a text, "" where none does."""
    if _tag(text):
        return "a tag around file context"
    if _diff(text):
        return "a patch"
    if _says(text):
        return "a file's name with its content"
    if _numbered(text):
        return "lines with their numbers"
    return _in_fences(text)


def _in_fences(text: str) -> str:
    lines: list[str] | None = None
    opened = before = ""
    for line in text.split("\n") if "```" in text or "~~~" in text else []:
        found = _fence.match(line)
        if lines is None:
            if found is None:
                before = line if line.strip() else before
                continue
            if _names_file(found.group(2)) or _is_path(before):
                return "a code block with its file's name"
            opened, lines = found.group(1), []
        elif found is not None and found.group(1).startswith(opened[:3]) and not found.group(2).strip():
            lines = None
            before = ""
        else:
            lines.append(line)
            comment = _comment.match(line) if len(lines) == 1 else None
            if comment is not None and _is_path(comment.group(1)):
                return "a code block with its file's name"
            if len(lines) >= FENCE_LINES:
                return f"a code block of {FENCE_LINES} lines or more"
    return ""


def _names_file(info: str) -> bool:
    """Whether what stands behind a fence names a file: `python src/app.py`, `12:20:src/app.py`, `js title="a.js"`."""
    words = re.split(r"[\s=:\"'{}(),]+", info)
    return any(_is_path(word) for word in words)


def _is_path(word: str) -> bool:
    stripped = word.strip().strip("#*`:_ \t")
    return _path.fullmatch(stripped) is not None
