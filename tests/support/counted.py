"""What the counters in Redis say, in a form that a test can compare."""

from broker.store import Store
from broker.usage import today


async def counted(store: Store) -> dict[str, dict[str, int]]:
    """The counters of the day: `<caller>:<lane>:<model asked for>:<model that served>` -> figure -> amount."""
    return {
        by.spelled: {figure.decode(): int(amount) for figure, amount in figures.items()}
        for by, figures in await today(store)
    }
