"""Whether a half-told answer can be gone on from, and from what."""

from broker.jobs import GoOn
from broker.policies import Active
from broker.records import JobRecord
from broker.store import Store


async def judge(store: Store, active: Active, job: JobRecord) -> GoOn | None:
    """Judges a held job whose worker or runtime is lost."""
    return None
