"""`gateway init`: a starter policy that always loads, whatever was found, and that keeps the right model warm."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import cli_init
from api.discover import FoundModel, FoundRuntime, make_policy
from api.gguf_files import FILES_MAX, GgufFile, find
from api.starter import USABLE, Machine, starter
from broker.policy import Policy
from tests.unit.test_cli import Gateway, a_person_who_has_set_nothing, gateway

__all__ = ["a_person_who_has_set_nothing", "gateway"]

GIB = 1 << 30
BOX = Machine(24 * GIB, "24.0G of GPU memory")


def ollama(*models: FoundModel) -> FoundRuntime:
    return FoundRuntime("ollama", "Ollama", "http://127.0.0.1:11434", list(models))


def written(*runtimes: FoundRuntime, files: list[GgufFile] | None = None, machine: Machine = BOX) -> Policy:
    return Policy.parse(starter(runtimes, files or [], machine).text)


def test_the_largest_coder_that_fits_is_kept_warm_and_the_smallest_helps_out() -> None:
    """One high-value coder stays warm; who helps out must fit beside it, or it would push it out."""
    found = ollama(
        FoundModel("llama3:70b", 40 * GIB),
        FoundModel("qwen2.5-coder:14b", 9 * GIB),
        FoundModel("qwen2.5-coder:7b", 5 * GIB),
        FoundModel("gemma:12b", 10 * GIB),
        FoundModel("nomic-embed-text:latest", GIB // 4, generates=False),
    )
    policy = written(found)
    warm = [name for name, model in policy.models.items() if model.keep_warm]
    assert warm == ["qwen2.5-coder-14b", "qwen2.5-coder-7b"]
    assert policy.models["qwen2.5-coder-14b"].fallback == "qwen2.5-coder-7b"
    assert policy.models["llama3-70b"].fallback == "qwen2.5-coder-7b"
    assert policy.models["nomic-embed-text"].fallback is None
    assert policy.models["llama3-70b"].aliases == ["llama3:70b"]
    assert policy.warnings() == []
    said = starter([found], [], BOX).said
    assert said[0] == "Ollama answers at http://127.0.0.1:11434 with 5 models"
    assert "qwen2.5-coder-14b is kept warm: the largest coder that fits into 24.0G of GPU memory, about 10.8G" in said


def test_nobody_helps_out_who_does_not_fit_beside_the_warm_one() -> None:
    policy = written(ollama(FoundModel("coder:32b", 17 * GIB), FoundModel("other:8b", 5 * GIB)))
    assert [model.keep_warm for model in policy.models.values()] == [True, False]
    assert {model.fallback for model in policy.models.values()} == {None}


def test_where_nothing_fits_the_smallest_is_taken_and_that_is_said() -> None:
    made = starter([ollama(FoundModel("a", 90 * GIB), FoundModel("b", 80 * GIB))], [], BOX)
    assert [name for name, model in Policy.parse(made.text).models.items() if model.keep_warm] == ["b"]
    assert any("b is kept warm: the smallest, because none is sure to fit" in sentence for sentence in made.said)


def test_files_are_served_by_a_llama_server_of_ours(tmp_path: Path) -> None:
    file = GgufFile("/weights/Qwen Coder.gguf", 4 * GIB)
    policy = written(files=[file])
    model = policy.models["qwen-coder"]
    assert (model.backend, model.model, model.url, model.context_tokens) == ("llama.cpp", file.path, None, 16_384)
    said = starter([], [file], Machine(24 * GIB, "24.0G of memory", has_llama_server=False)).said
    assert "no llama-server is on the PATH: install it, or name one in `command:`" in said


def test_with_nothing_found_the_policy_is_simulated() -> None:
    assert [model.backend for model in written().models.values()] == ["simulated"]


@pytest.mark.parametrize(
    "names",
    [
        ["a", "A", "a-2"],  # the key of one is the name of another
        ["x", "x.batch", "x.batch.batch"],  # a model's name may not be that of a batch lane
        ["a: b # c", "'", '"', "- x", "{y}", "yes", "null", "0x1f", "1e3", "~", "*a", "&a", "!t", "%", "@", "`"],
        ["\u2028", "a\nb", "\udc80", " ", "", "\x00", "a" * 5_000],  # what nobody can type is left out
        ["a" * 200, "a" * 201, "模型", "模型2"],
        ["same", "same"],
    ],
)
def test_odd_names_make_a_policy_that_loads(names: list[str]) -> None:
    models = [FoundModel(name, GIB) for name in names]
    written(ollama(*models), files=[GgufFile(f"/m/{name}.gguf", GIB) for name in names])
    Policy.parse(make_policy([ollama(*models), ollama(*models)]).text)


SIZES = st.integers(0, 100 * GIB)
NAMES = st.text(max_size=40) | st.sampled_from(["a", "A", "a:latest", "x.batch", "/m/coder.gguf", "a-2", "b/c:d"])
MODELS = st.lists(st.builds(FoundModel, NAMES, SIZES, st.booleans()), max_size=6)
FOUND = st.lists(
    st.builds(
        FoundRuntime,
        st.sampled_from(["ollama", "llama.cpp"]),
        st.just("Something"),
        st.sampled_from(["http://127.0.0.1:11434", "http://127.0.0.1:8080"]),
        MODELS,
    ),
    max_size=3,
)


@given(
    found=FOUND,
    files=st.lists(st.builds(GgufFile, NAMES, SIZES, st.booleans()), max_size=6),
    memory=st.integers(0, 200 * GIB),
)
def test_whatever_is_found_the_policy_loads_and_what_it_keeps_warm_fits(
    found: list[FoundRuntime], files: list[GgufFile], memory: int
) -> None:
    """At least one model is kept warm; two only where both are known to fit."""
    machine = Machine(memory, "some memory")
    policy = Policy.parse(starter(found, files, machine).text)
    Policy.parse(make_policy(found).text)
    sizes = {model.name: model.size_bytes for runtime in found for model in runtime.models}
    sizes |= {file.path: file.size_bytes for file in files}
    warm = [model for model in policy.models.values() if model.keep_warm]
    assert 1 <= len(warm) <= 2
    if len(warm) == 2 and len({model.model for model in policy.models.values()}) == len(policy.models):
        assert sum(sizes[model.model] for model in warm) * 1.19 <= memory * USABLE
    assert not any("second cold start" in warning for warning in policy.warnings(exists=lambda _: True))


# --- files -------------------------------------------------------------------------------------------------------


def put(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as out:
        out.truncate(size)
    return path


def test_weights_are_found_below_a_folder_once_and_shards_are_one(tmp_path: Path) -> None:
    """What is no model of its own is left alone: a projector, a vocabulary, a later shard, a link to nowhere."""
    big = put(tmp_path / "sub" / "deep" / "Big.GGUF", 30)
    first = put(tmp_path / "split-00001-of-00003.gguf", 5)
    put(tmp_path / "split-00002-of-00003.gguf", 6)
    put(tmp_path / "bge-small.gguf", 3)
    for name in ("mmproj-x.gguf", "ggml-vocab-llama.gguf", "notes.txt"):
        put(tmp_path / name, 9)
    (tmp_path / "again.gguf").symlink_to(big)
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere")
    found = {Path(file.path).name: file for file in find([tmp_path, tmp_path / "sub", tmp_path / "missing"])}
    assert set(found) == {"again.gguf", "split-00001-of-00003.gguf", "bge-small.gguf"}
    assert found["again.gguf"].size_bytes == 30
    assert found[first.name].size_bytes == 11
    assert [file.generates for file in found.values()] == [True, False, True]


def test_no_more_files_than_a_person_can_choose_from(tmp_path: Path) -> None:
    for number in range(FILES_MAX + 5):
        put(tmp_path / f"{number:02d}.gguf", 1)
    assert len(find([tmp_path])) == FILES_MAX


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder to work in, on a machine on which nothing runs."""
    for name in ("GATEWAY_OLLAMA_URL", "GATEWAY_LLAMA_SERVER_URL", "GATEWAY_VLLM_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(cli_init, "USUAL_FOLDERS", ())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_init_writes_a_file_that_check_takes(here: Path, gateway: Gateway) -> None:
    weights = put(here / "weights" / "coder.gguf", 1000)
    ran = gateway("init", "--gguf-dir", "weights")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "found 1 GGUF file" and lines[-1].startswith("wrote policy.yaml: next, `gateway up")
    assert any(line.startswith("coder is kept warm: the largest coder that fits into ") for line in lines)
    checked = gateway("policy", "check", "policy.yaml")
    assert (checked.code, checked.out) == (0, "policy.yaml: fine, 1 model, 1 lane, 0 routing rules\n")
    assert Policy.parse((here / "policy.yaml").read_text()).models["coder"].model == str(weights)


def test_init_takes_the_files_of_the_folder_it_runs_in_but_nothing_below(here: Path, gateway: Gateway) -> None:
    """Whoever stands among GGUF files means them; whoever stands in a home directory does not mean all of it."""
    mine = put(here / "mine.gguf", 1000)
    put(here / "projects" / "test-model.gguf", 1000)
    assert "found 1 GGUF file" in gateway("init").out
    models = Policy.parse((here / "policy.yaml").read_text()).models
    assert {model.model for model in models.values()} == {str(mine)}


def test_init_that_finds_nothing_says_where_it_would_look(here: Path, gateway: Gateway) -> None:
    assert "--gguf-dir" in gateway("init").out


def test_init_goes_by_the_memory_that_a_worker_would_have(
    here: Path, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_MEMORY_MB", "2048")
    assert "this machine has 2.0G of memory for models" in gateway("init").out
    monkeypatch.setenv("GATEWAY_MEMORY_MB", "much")
    gateway("init", "other.yaml").complains(2, "GATEWAY_MEMORY_MB must be a whole number")


def test_init_replaces_nothing_unless_told_to(here: Path, gateway: Gateway) -> None:
    file = here / "mine.yaml"
    file.write_text("my own words")
    gateway("init", "mine.yaml").complains(2, "mine.yaml is there already", "--force")
    assert file.read_text() == "my own words"
    assert gateway("init", "mine.yaml", "--force").code == 0
    assert "simulated" in file.read_text()


def test_init_says_what_it_cannot_do(here: Path, gateway: Gateway) -> None:
    gateway("init", "--gguf-dir", "nowhere").complains(2, "nowhere is no folder")
    gateway("init", "no/such/folder.yaml").complains(2, "no/such/folder.yaml can't be written", "No such file")
