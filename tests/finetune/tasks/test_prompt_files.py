import json
import traceback

import pytest

from diablo_theory.errors import ConfigError
from diablo_theory.finetune.tasks.prompt_files import read_prompts

#: Harmless, and found nowhere else: whatever shows it has leaked it.
SECRET = "How does one fold a quokka out of paper"


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", 'one?\n\n two, "quoted" \nthree’s\n'),
        ("p.jsonl", '"one?"\n{"prompt": "two, \\"quoted\\""}\n\n{"instruction": "three’s", "text": ""}\n'),
        ("p.json", '["one?", {"question": "two, \\"quoted\\"", "id": 3}, {"text": "three’s"}]'),
        ("p.csv", 'one?\n"two, ""quoted"""\nthree’s\n'),
        ("p.CSV", 'id, Prompt \r\n1,one?\r\n\r\n2,"two, ""quoted"""\r\n3,three’s\r\n'),
        ("p.csv", '\ufeffprompt\none?\n"two, ""quoted"""\nthree’s'),
    ],
)
def test_every_form(tmp_path, name, text):
    write(tmp_path, name, text)
    assert read_prompts(tmp_path) == ["one?", 'two, "quoted"', "three’s"]


def test_files_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1, 2):
        write(tmp_path, f"category_{number}.csv", f"prompt {number}\n")
    write(tmp_path, "README.md", "not a prompt")
    (tmp_path / "more.txt").mkdir()
    assert read_prompts(tmp_path) == ["prompt 1", "prompt 2", "prompt 9", "prompt 10"]


@pytest.mark.parametrize("name", ["LICENSE.txt", "license.txt", "LICENCE-hex.txt", "README.txt", "Notice.txt"])
@pytest.mark.parametrize("prompts", ["p.csv", "p.txt"])
def test_the_terms_are_no_prompts(tmp_path, name, prompts):
    write(tmp_path, name, "Permission is granted.\nNot for harm.\n")
    write(tmp_path, prompts, "one?\ntwo?\n")
    assert read_prompts(tmp_path) == ["one?", "two?"]


def test_notes_beside_tables_are_asked_about(tmp_path):
    write(tmp_path, "p.csv", "one?\n")
    write(tmp_path, "mine.txt", SECRET)
    with pytest.raises(ConfigError, match=r"has \.txt files beside \.csv: leave those alone there") as caught:
        read_prompts(tmp_path)
    assert "quokka" not in everything(caught.value)


def test_a_prompt_may_have_line_breaks(tmp_path):
    write(tmp_path, "p.csv", '"first\nsecond"\n')
    assert read_prompts(tmp_path) == ["first\nsecond"]


BAD = [
    ("p.json", json.dumps({"prompts": [SECRET]}), "must hold one JSON list"),
    ("p.json", f'["{SECRET}"', "must hold one JSON list"),
    ("p.json", "[" * 100_000 + SECRET, "must hold one JSON list"),
    ("p.json", json.dumps([SECRET, 3]), "row 2 must be a text or have one in a field of prompt"),
    ("p.json", json.dumps([{SECRET: SECRET}]), "row 1 must be a text"),
    ("p.json", json.dumps([{"prompt": [SECRET]}]), "row 1 must be a text"),
    ("p.json", json.dumps([SECRET, "  "]), "row 2 must be a text"),
    ("p.json", "[]", "holds no prompts"),
    ("p.json", json.dumps({"error": SECRET}), "holds an error message"),
    ("p.jsonl", f'"{SECRET}"\n{{"prompt": "{SECRET}\n', "line 2 is not JSON"),
    ("p.csv", f'"{SECRET}', "is a quotation mark left open"),
    ("p.csv", f"{SECRET}, please\n{SECRET}\n", "different numbers of columns"),
    ("p.csv", f"{SECRET},{SECRET}!\n", "the first row must name the columns"),
    ("p.csv", "prompt,id\n", "holds no prompts"),
    ("p.txt", "\n\n", "holds no prompts"),
    ("p.txt", f"{SECRET}\n{SECRET}\n", "prompt 2 is prompt 1 again"),
    ("p.txt", SECRET * 300, "is there one prompt a row"),
    ("p.txt", SECRET.encode("utf-16"), "is not UTF-8 text"),
    ("p.txt", SECRET.encode() + b"\xff", "is not UTF-8 text"),
    ("p.txt", f"{SECRET}\0", "is not UTF-8 text"),
    ("p.csv", f"<!DOCTYPE html>{SECRET}", "holds a web page"),
    ("p.csv", f"version https://git-lfs.github.com/spec/v1 {SECRET}", "holds a pointer of Git LFS"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_what_is_wrong_is_said_and_not_quoted(tmp_path, name, text, message):
    path = write(tmp_path, name, text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_prompts(tmp_path)
    assert str(path.parent) in str(caught.value)
    assert "quokka" not in everything(caught.value)


def everything(error):
    """What an error and those behind it would show: their text, traceback and attributes."""
    shown = []
    while error is not None:
        shown += ["".join(traceback.format_exception(error)), repr(error), repr(error.args), repr(vars(error))]
        shown += [repr(getattr(error, name, "")) for name in ("doc", "object", "obj")]
        error = error.__cause__ or error.__context__
    return "".join(shown)


def test_everything_would_find_a_leak():
    with pytest.raises(ConfigError) as caught:
        _leaking()
    assert "quokka" not in "".join(traceback.format_exception(caught.value))
    assert "quokka" in everything(caught.value)


def _leaking():
    text = f"{SECRET}, perhaps"
    try:
        json.loads(text)
    except ValueError:
        raise ConfigError("no JSON") from None


@pytest.mark.parametrize("name", ["p.md", None])
def test_a_folder_without_prompts(tmp_path, name):
    folder = tmp_path / "folder"
    if name:
        folder.mkdir()
        write(folder, name, "text")
    with pytest.raises(ConfigError, match=r"no \.csv, \.json, \.jsonl, \.txt file in"):
        read_prompts(folder)
