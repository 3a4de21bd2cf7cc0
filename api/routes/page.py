"""The page at `/`: plain files of `api/page` that live by `/v1/status/events`. They hold no data and need no key."""

from functools import cache
from importlib import resources

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from api.described import Answer, Described, described
from broker import errors
from broker.dialects.json_schema import one_of, text

router = APIRouter(tags=["page"])

ALIVE = "Ollama is running"
"""What an Ollama says at its address: its clients look for these words."""

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

POLICY = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}
"""Nothing comes from elsewhere and nothing goes there; what the gateway's answers hold is text and never markup."""


@router.api_route("/", methods=["GET", "HEAD"])
@described(
    Described(
        "The page, or: is anybody there?", "page", keyless=True,
        words="A browser, which asks for text/html, gets the status page; anybody else what an Ollama says.",
        answers={200: Answer("It.", {"text/plain": one_of(ALIVE), "text/html": text()})},
    )
)  # fmt: skip
async def root(request: Request) -> Response:
    """Gives the page to browsers, and Ollama's words to everybody else."""
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse(ALIVE, headers={"vary": "accept"})
    return Response(_files()["index.html"], headers={"content-type": KINDS["html"], "vary": "accept", **POLICY})


@router.get("/page/{name}")
@described(
    Described(
        "A file of the page", "page", keyless=True, within={"name": text("Its name.")}, fails=(errors.NoSuchFile,),
        answers={200: Answer("It.", {kind.partition(";")[0]: text() for kind in KINDS.values()})},
    )
)  # fmt: skip
async def part(name: str) -> Response:
    """Gives a script, a style sheet or the icon."""
    if name not in _files():
        raise errors.NoSuchFile(name[:64])
    return Response(_files()[name], headers={"content-type": KINDS[name.rpartition(".")[2]], **POLICY})


@cache
def _files() -> dict[str, bytes]:
    """All of them, read once."""
    folder = resources.files("api").joinpath("page")
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name.rpartition(".")[2] in KINDS}
