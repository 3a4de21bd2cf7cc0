"""What became of an ended job, said as its endpoint would have said it to a client that waited: the whole answer, or
the error with its own status."""

from api import errors as told
from api.exchange import Headers
from api.gateway import Gateway
from api.stream import JSON, fold
from api.voices import voice_of
from broker import errors, kept
from broker.records import Frame, JobRecord


async def result_of(gateway: Gateway, job: JobRecord) -> tuple[int, Headers, bytes]:
    """Gives status, headers and body; raises NotEnded, NoSuchJob where it is forgotten meanwhile."""
    if job.live:
        raise errors.NotEnded(job.id, job.state.value)
    whole, last = await kept.answer_of(gateway.store, job.id)
    if last is None:
        raise errors.NoSuchJob(job.id)
    tells = [(b"x-gateway-job", job.id.encode()), (b"x-gateway-lane", job.lane.encode())]
    if last.kind != "done":
        return _failure(job, last, tells)
    if job.served_by:
        tells.append((b"x-gateway-served-by", job.served_by.encode("latin-1", "replace")))
    return 200, [*JSON, *tells], await fold(voice_of(job), whole, sum(map(len, whole)))


def _failure(job: JobRecord, last: Frame, tells: list[tuple[bytes, bytes]]) -> tuple[int, Headers, bytes]:
    wrong, dialect = told.ended(last), told.dialect_of(job.endpoint)
    return dialect.status(wrong), [*wrong.headers(), *tells], dialect.body(wrong)
