"""The pictures of docs/concepts.md are true: of a policy, and of what the waker does with a model."""

import re
from pathlib import Path

import pytest

from broker import model_life, pictures
from broker.status import NO_HOST
from tests.support.pages import ROOT, marked

MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)


def test_anybody_may_print_the_picture_of_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words of the page, in its order."""
    page = ROOT / "docs" / "concepts.md"
    [command] = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    [file] = [block.text for block in marked(ROOT / "docs" / "policy.md") if block.name == "policy.yaml"]
    (tmp_path / "policy.yaml").write_text(file)
    monkeypatch.chdir(tmp_path)
    for line in command.splitlines():
        assert line.startswith("python -m broker.pictures ")
        monkeypatch.setattr("sys.argv", line.split()[2:])
        pictures.main()
        assert capsys.readouterr().out in MERMAID.findall(page.read_text())


@pytest.mark.parametrize(
    "words", [[], ["lanes"], ["faces", "policy.yaml"], ["lanes", "away.yaml"], ["lanes", "bad.yaml"]]
)
def test_wrong_words_are_told_in_a_sentence(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.yaml").write_text("models: {}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["pictures", *words])
    with pytest.raises(SystemExit) as told:
        pictures.main()
    assert isinstance(told.value.code, str) and told.value.code


def test_the_table_of_a_models_life_has_the_states_that_the_waker_names() -> None:
    """Which arrows it really takes, every test with a `gateway up` looks into its log for."""
    waker = (ROOT / "workers" / "waker.py").read_text()
    named = set(re.findall(r'_(?:become|is_now)\("(\w+)"', waker)) | {"warm", "degraded"}
    reached = {to for arrows in model_life.ARROWS.values() for to in arrows}
    assert named == reached == set(model_life.ARROWS) == set(model_life.STATES) - {NO_HOST}
