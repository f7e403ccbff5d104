import dataclasses
import json
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diablo_theory.errors import ConfigError, DataUnavailableError
from diablo_theory.finetune.tasks.records import Source, digest, load

SOURCE = Source(
    place="owner/hens",
    fields=("question", "answer"),
    optional=("hint",),
    aliases={"question": "query"},
    splits={"train": "training", "test": "test"},
    folders=("birds/hens", "hens"),
    files={"test": ("hens_test.json",)},
    config="main",
    revision="abc123",
    licence="MIT",
)
ROWS = [{"question": "How many?", "answer": "3"}, {"question": "Which?", "answer": "red", "hint": "a colour"}]
LOADED = [{"question": "How many?", "answer": "3", "hint": ""}, ROWS[1]]


def put(root, name, content):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["birds/hens/test.json", "hens/test.json", "hens/test.jsonl", "hens_test.json", "birds/hens/test.jsonl"]
)
@pytest.mark.parametrize("lines", [True, False])
def test_every_layout_is_read(tmp_path, name, lines):
    """Whether it is an array or lines is seen from the content, since public files are not always named by it."""
    put(tmp_path, name, "\n".join(map(json.dumps, ROWS)) + "\n\n" if lines else json.dumps(ROWS, indent=2))
    records = load(SOURCE, "test", tmp_path)
    assert records == LOADED
    assert [record.number for record in records] == [1, 2]
    assert records[0].file == str(tmp_path / name)


def test_the_first_place_is_taken(tmp_path):
    put(tmp_path, "hens/test.json", json.dumps(ROWS[1:]))
    put(tmp_path, "birds/hens/test.json", json.dumps(ROWS))
    assert load(SOURCE, "test", tmp_path) == LOADED


def test_parquet_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "hens").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[:1]), tmp_path / "hens/test.parquet")
    assert load(SOURCE, "test", tmp_path) == LOADED[:1]
    put(tmp_path, "hens/test.parquet", "PAR1 but no more")
    with pytest.raises(ConfigError, match=r"test\.parquet is truncated or no parquet file"):
        load(SOURCE, "test", tmp_path)


def test_numbers_become_text_and_aliases_are_known(tmp_path):
    put(tmp_path, "hens/test.json", json.dumps([{"query": "How many?", "answer": 3.5}]))
    assert load(SOURCE, "test", tmp_path) == [{"question": "How many?", "answer": "3.5", "hint": ""}]


def test_a_byte_order_mark_is_no_content(tmp_path):
    put(tmp_path, "hens/test.json", "\ufeff" + json.dumps(ROWS))
    assert load(SOURCE, "test", tmp_path) == LOADED


GOOD = json.dumps(ROWS[0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "test.json holds no records"),
        ("[]", "test.json holds no records"),
        (f"[{GOOD}, {GOOD}, " + '{"question": "Ho', r"test.json, record 3: truncated or damaged JSON"),
        (f"[{GOOD}, {GOOD}", r"test.json, record 3: truncated or damaged JSON"),
        ("[", r"test.json, record 1: truncated or damaged JSON"),
        ("[" * 5000, r"test.json, record 1: truncated or damaged JSON"),
        ('[{"question": ' + "9" * 5000 + "}]", r"test.json, record 1: truncated or damaged JSON"),
        ('{"question": ' + "9" * 5000 + "}", r"test.json, record 1: truncated or damaged \(Exceeds the limit"),
        (f"{GOOD}\n\n{GOOD}\n" + '{"question": "Ho', r"test.json, record 3: truncated or damaged .*a line"),
        ("<html>", r"test.json, record 1: truncated or damaged"),
        (f"[{GOOD}, 7]", "record 2: an object with question, answer is needed, got int"),
        (f"[{GOOD}, []]", "record 2: an object with question, answer is needed, got list"),
        ('[{"question": "Q", "reply": "3"}]', "record 1: the field 'answer' is missing; there are question, reply"),
        ("[{}]", "record 1: the field 'question' is missing; there are none"),
        ('[{"question": "Q", "answer": null}]', "record 1: the field 'answer' is missing"),
        ('[{"question": "Q", "answer": ["3"]}]', r"record 1: answer must be text or a number, got \['3'\]"),
        ('[{"question": "Q", "answer": true}]', "record 1: answer must be text or a number, got True"),
        ('[{"question": "Q", "answer": "3", "hint": {"a": 1}}]', "record 1: hint must be text or a number"),
        ('[{"question": "Q", "answer": "\\ud800"}]', "record 1: answer is no Unicode text"),
    ],
)
def test_a_bad_file_is_named_with_its_record(tmp_path, content, message):
    put(tmp_path, "hens/test.json", content)
    with pytest.raises(ConfigError, match=message):
        load(SOURCE, "test", tmp_path)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "hens").mkdir()
    (tmp_path / "hens/test.json").write_bytes(b"[\xff\xfe]")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load(SOURCE, "test", tmp_path)


@given(st.integers(0, 4), st.integers(1, 30))
def test_a_file_cut_anywhere_is_never_taken_for_whole(tmp_path_factory, whole, kept):
    root = tmp_path_factory.mktemp("cut")
    content = "[" + ", ".join([GOOD] * whole + [GOOD[: min(kept, len(GOOD) - 1)]])
    put(root, "hens/test.json", content)
    with pytest.raises(ConfigError, match=f"record {whole + 1}:"):
        load(SOURCE, "test", root)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_only_the_published_number_of_records_is_the_whole(tmp_path, kept):
    """Lines that are cut at a line end are good lines, and what stands above is not enough to tell."""
    put(tmp_path, "hens/test.jsonl", f"{GOOD}\n" * kept)
    source = dataclasses.replace(SOURCE, sizes={"test": 2})
    assert len(load(source, "test", tmp_path)) == kept
    if kept == 2:
        assert len(load(source, "test", tmp_path, whole=True)) == 2
    else:
        message = f"test.jsonl holds {kept} records; the test split of owner/hens has 2: .*of small scale"
        with pytest.raises(ConfigError, match=message):
            load(source, "test", tmp_path, whole=True)
    assert len(load(SOURCE, "test", tmp_path, whole=True)) == kept  # of a size that is not known


def test_a_missing_file_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataUnavailableError) as caught:
        load(SOURCE, "test", tmp_path)
    for part in ("birds/hens/test.json", "hens/test.parquet", "hens_test.json", "owner/hens", "hub", "MIT"):
        assert part in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data_root: .*nowhere is not a folder"):
        load(SOURCE, "test", tmp_path / "nowhere")


@pytest.fixture
def hub(monkeypatch):
    """A hub in place of the real one, and what it was asked for."""
    asked = []

    def load_dataset(place, config, *, split, revision):
        asked.append((place, config, split, revision))
        return iter(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_the_hub_is_asked_for_one_revision(hub):
    records = load(SOURCE, "train")
    assert hub == [("owner/hens", "main", "training", "abc123")]
    assert records == LOADED
    assert records[0].file == "owner/hens@abc123, split training"


def test_real_datasets_take_the_call(tmp_path):
    """The library's own signature, on a folder in place of the hub."""
    pytest.importorskip("datasets")
    put(tmp_path / "set", "train.jsonl", "\n".join(json.dumps(row | {"hint": ""}) for row in ROWS))
    source = Source(str(tmp_path / "set"), ("question", "answer"), {"train": "train"}, ("x",), "MIT")
    assert [record["answer"] for record in load(source, "train")] == ["3", "red"]


@pytest.mark.parametrize("error", [ConnectionError("offline"), FileNotFoundError("withdrawn"), ValueError("no split")])
def test_a_fetch_that_fails_says_what_to_do(monkeypatch, error):
    def load_dataset(*_args, **_kwargs):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataUnavailableError) as caught:
        load(SOURCE, "test")
    for part in ("owner/hens", "abc123", str(error), "birds/hens/test.json", "data_root=FOLDER", "MIT"):
        assert part in str(caught.value)


def test_a_flag_changes_a_digest_only_where_it_is_set():
    plain, flagged = {"a": "1", "choices": ()}, {"a": "1", "choices": (), "bare": False}
    assert digest([plain]) == digest([flagged]) != digest([flagged | {"bare": True}])
    assert digest([{"a": ""}]) != digest([{}])


def test_the_digest_sees_content_and_order_but_not_the_order_of_fields():
    first, second = {"a": "1", "b": "2"}, {"a": "3"}
    assert digest([first, second]) == digest([{"b": "2", "a": "1"}, second])
    assert len({digest(rows) for rows in ([first, second], [second, first], [first], [], [first | {"b": "3"}])}) == 5
    assert digest([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
