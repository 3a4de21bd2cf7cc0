"""`gateway top`: the gateway on one screen, looked at again and again over HTTP. The only file that imports Textual."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import DataTable, Footer, Input, Static

from api import top_view
from api.client import snapshot_of
from api.exit_codes import Failed
from api.status_table import duration
from api.terminal import harmless
from api.top_view import Column, Row
from broker.status import Snapshot

STALE_AFTER_S = 3.0
"""Figures that are older than this, and than three looks, are called stale."""

TONES = {
    "warm": "green", "degraded": "yellow", "waking": "cyan", "unloading": "cyan", "quarantined": "red", "absent": "red",
    "late": "red", "full": "yellow", "waits": "bold", "draining": "yellow",
    "silent": "red",
}  # fmt: skip

Ask = Callable[[], Awaitable[dict[str, Any]]]
Clock = Callable[[], float]


class Table(DataTable[Text]):
    """One of the four tables, with the order of its rows. It keeps the chosen row over looks."""

    def __init__(self, name: str, columns: tuple[Column, ...], rows: Callable[..., list[Row]]) -> None:
        super().__init__(id=name, cursor_type="row", zebra_stripes=True)
        self._columns_shown = columns
        self._rows_of = rows
        self.sort_by = 0
        self.backwards = False

    def show(self, snapshot: Snapshot, only: str) -> None:
        """Shows the rows of a snapshot."""
        chosen = self.chosen
        self.clear(columns=True)
        for place, column in enumerate(self._columns_shown):
            mark = ("v" if column.falling != self.backwards else "^") if place == self.sort_by else " "
            self.add_column(f"{column.head}{mark}")
        rows = self._rows_of(snapshot, sort=self.sort_by, backwards=self.backwards, only=only)
        for row in rows:
            tone = TONES.get(row.tone, "")
            self.add_row(*(Text(cell, style=tone) for cell in row.cells), key=row.name)
        names = [row.name for row in rows]
        if chosen in names:
            self.move_cursor(row=names.index(chosen), animate=False)

    @property
    def chosen(self) -> str:
        """The name of the row under the cursor, "" where there is none."""
        if not self.row_count:
            return ""
        return str(self.coordinate_to_cell_key(self.cursor_coordinate).row_key.value)

    def sort_next(self) -> None:
        """Sorts by the next column."""
        self.sort_by = (self.sort_by + 1) % len(self._columns_shown)
        self.backwards = False


class Top(App[None]):
    """The screen. `ask` gives what /v1/status says, or raises Failed with a sentence."""

    CSS = """
    Screen { layout: vertical; }
    #state { height: 1; padding: 0 1; background: $primary; color: $text; }
    #state.stale { background: $warning; }
    #state.lost { background: $error; }
    DataTable { height: auto; max-height: 30%; margin: 0 0 1 0; }
    DataTable.old { opacity: 60%; }
    #filter { display: none; dock: bottom; }
    #filter.open { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("s", "sort", "Sort by the next column"),
        Binding("S", "reverse", "The other way round"),
        Binding("slash", "filter", "Filter", key_display="/"),
        Binding("escape", "clear", "All", show=False),
        Binding("r", "look", "Look now"),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, ask: Ask, *, url: str, every_s: float, clock: Clock = time.monotonic) -> None:
        super().__init__()
        self._ask = ask
        self._url = url
        self._every_s = every_s
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._seen_at = clock()
        self._problem = ""
        self._only = ""
        self._now = asyncio.Event()

    def compose(self) -> ComposeResult:
        yield Static(id="state", markup=False)
        yield Table("models", top_view.MODELS, top_view.model_rows)
        yield Table("lanes", top_view.LANES, top_view.lane_rows)
        yield Table("jobs", top_view.JOBS, top_view.job_rows)
        yield Table("hosts", top_view.HOSTS, top_view.host_rows)
        yield Input(id="filter", placeholder="part of a name; Enter keeps it, Esc shows all")
        yield Footer()

    def on_mount(self) -> None:
        """Begins to look."""
        self.query_one("#models", Table).focus()
        self.set_interval(min(0.5, self._every_s), self._tell_state)
        self.run_worker(self._keep_looking(), name="looks", exclusive=True)

    async def _keep_looking(self) -> None:
        while True:
            await self.look()
            self._now.clear()
            try:
                async with asyncio.timeout(self._every_s):
                    await self._now.wait()
            except TimeoutError:
                pass

    async def look(self) -> None:
        """Asks once, and shows what came or why nothing did. The same moment told again is nothing new."""
        try:
            shown = snapshot_of(await self._ask())
        except Failed as problem:
            self._problem = str(problem)
        else:
            if self._snapshot is None or shown.at_ms != self._snapshot.at_ms:
                self._seen_at = self._clock()
            self._snapshot, self._problem = shown, ""
        self._show()

    def _show(self) -> None:
        if self._snapshot is not None:
            for table in self.query(Table):
                table.show(self._snapshot, self._only)
        self._tell_state()

    def _tell_state(self) -> None:
        """The first line: what there is, how old it is, and why nothing newer comes."""
        age_s = self._clock() - self._seen_at
        stale = self._snapshot is not None and age_s > max(STALE_AFTER_S, 3 * self._every_s)
        for line in self.query("#state").results(Static):  # there is none any more while the screen goes
            line.set_class(bool(self._problem), "lost")
            line.set_class(stale and not self._problem, "stale")
            line.update(harmless("   ".join(self._words(age_s, stale))))
        for table in self.query(Table):
            table.set_class(bool(self._problem) or stale, "old")

    def _words(self, age_s: float, stale: bool) -> list[str]:
        words = [self._url]
        age = duration(age_s * 1_000)
        if self._problem:
            words.append(f"CONNECTION LOST, figures are {age} old" if self._snapshot else "NO CONNECTION")
            words.append(self._problem)
            return words
        if self._snapshot is None:
            return [*words, "asking"]
        words.append(f"STALE: nothing new for {age}" if stale else "live")
        words.append(top_view.summary(self._snapshot))
        if self._only:
            words.append(f"only {self._only!r}")
        return words

    def action_sort(self) -> None:
        """Sorts the table that has the focus by its next column."""
        if isinstance(self.focused, Table):
            self.focused.sort_next()
            self._show()

    def action_reverse(self) -> None:
        """Turns its order round."""
        if isinstance(self.focused, Table):
            self.focused.backwards = not self.focused.backwards
            self._show()

    def action_filter(self) -> None:
        """Asks for a part of a name."""
        field = self.query_one("#filter", Input)
        field.add_class("open")
        field.focus()

    def action_clear(self) -> None:
        """Shows everything again."""
        self.query_one("#filter", Input).value = ""
        self._only = ""
        self._close_filter()

    def action_look(self) -> None:
        """Looks at once."""
        self._now.set()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filters while somebody types."""
        self._only = event.value.strip()
        self._show()

    def on_input_submitted(self) -> None:
        """Keeps the filter and gives the keys back to the tables."""
        self._close_filter()

    def _close_filter(self) -> None:
        self.query_one("#filter", Input).remove_class("open")
        self.query_one("#models", Table).focus()
        self._show()
