from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.prompts import PromptSource, load_prompts
from diffalign.errors import DataError

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="no shared/data folder beside the checkout"
)


def write(folder: Path, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    return str(folder / name)


def error_of(path: str) -> DataError:
    with pytest.raises(DataError) as caught:
        load_prompts(path)
    return caught.value


def test_txt_has_one_prompt_a_line_without_blanks_and_comments(tmp_path: Path):
    path = write(tmp_path, "a.txt", "\ufeff# head\n a cat \r\n\n  # note\na dog, #1\nno\u2028break")
    assert load_prompts(path) == ["a cat", "a dog, #1", "no\u2028break"]


def test_limit_takes_the_first_and_does_not_check_the_rest(tmp_path: Path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\nbroken')
    assert load_prompts(path, limit=2) == ["a", "b"]


@pytest.mark.parametrize("key", ["prompt", "Prompt", "caption", "text"])
def test_jsonl_takes_objects_and_strings(tmp_path: Path, key: str):
    path = write(tmp_path, "a.jsonl", json.dumps({key: "a cat", "tag": 1}) + '\n\n"a dog"\n')
    assert load_prompts(path) == ["a cat", "a dog"]


def test_json_is_a_list_of_strings_or_objects(tmp_path: Path):
    assert load_prompts(write(tmp_path, "a.json", '["a cat",\n {"text": "a dog"}]')) == ["a cat", "a dog"]


def test_csv_quotes_hold_separators_quotes_and_line_breaks(tmp_path: Path):
    path = write(tmp_path, "a.csv", 'id,prompt\n1,"a ""big"" cat, red"\n\n2,"two\nlines"\n')
    assert load_prompts(path) == ['a "big" cat, red', "two\nlines"]


def test_tsv_keeps_loose_quotes_and_removes_those_around_a_field(tmp_path: Path):
    path = write(tmp_path, "a.tsv", 'prompt\tid\n"Hi" sign\t1\n"a ""big"" cat"\t2\n"open\t3\n')
    assert load_prompts(path) == ['"Hi" sign', 'a "big" cat', '"open']


def test_parquet_takes_the_prompt_column(tmp_path: Path):
    pq.write_table(pa.table({"caption": ["wrong"], "prompt": ["a cat"]}), tmp_path / "a.parquet")
    assert load_prompts(str(tmp_path / "a.parquet")) == ["a cat"]


@needs_published
def test_parti_prompts_load_whole():
    file = PUBLISHED / "PartiPrompts.tsv"
    prompts = load_prompts(str(file))
    first_fields = [line.split("\t")[0].strip() for line in file.read_text().split("\n")[1:] if line]
    assert len(prompts) == 1632
    assert prompts == first_fields


@needs_published
def test_geneval_prompts_load_whole():
    prompts = load_prompts(str(PUBLISHED / "geneval_metadata.jsonl"))
    assert len(prompts) == 553
    assert prompts[0] == "a photo of a bench"


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.txt", "", "no prompts", "a.txt"),
        ("a.txt", "# only\n\n", "no prompts", "a.txt"),
        ("a.csv", "prompt\n", "no prompts", "a.csv"),
        ("a.json", "[]", "no prompts", "a.json"),
        ("a.txt", b"ok\ncaf\xe9\n", "text is not UTF-8", "a.txt:2"),
        ("a.txt", "a cat".encode("utf-16"), "text is not UTF-8", "a.txt:1"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": 3}', "prompt is not text", "a.jsonl:3"),
        ("a.jsonl", '{"prompt": null}', "prompt is missing", "a.jsonl:1"),
        ("a.jsonl", '{"prompt": " "}', "prompt is empty", "a.jsonl:1"),
        ("a.jsonl", '"a"\n{"prompt": "a"', "malformed JSON", "a.jsonl:2"),
        ("a.jsonl", "[" * 100_000, "malformed JSON", "a.jsonl:1"),
        ("a.json", '["a",\n"b"', "malformed JSON", "a.json:2"),
        ("a.json", '{"prompt": "a"}', "JSON file without a list", "a.json"),
        ("a.json", '["a", 3]', "prompt is not text", "a.json, entry 2"),
        ("a.csv", "prompt,id\na cat, red,1\n", "row with 3 fields under a header of 2", "a.csv:2"),
        ("a.csv", 'prompt\n"a cat\na dog\n', "malformed CSV", "a.csv:3"),
        ("a.tsv", "prompt\tid\na\n", "row with 1 fields under a header of 2", "a.tsv:2"),
        ("a.csv", "prompt,id\n,1\n", "prompt is empty", "a.csv:2"),
        ("a.parquet", b"PAR1 no", "Parquet file cannot be read", "a.parquet"),
        ("a.pdf", "a", "unknown prompt format", "a.pdf"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, what: str, where: str
):
    error = error_of(write(tmp_path, name, content))
    assert error.what == what
    assert error.where == str(tmp_path / where)


def test_a_missing_file_and_a_folder_are_data_errors(tmp_path: Path):
    assert error_of(str(tmp_path / "gone.txt")).what == "file not found"
    assert error_of(str(tmp_path)).what == "a folder where a file is needed"


def test_a_missing_column_lists_those_present(tmp_path: Path):
    for path in (
        write(tmp_path, "a.csv", "id,words\n1,b\n"),
        write(tmp_path, "a.jsonl", '{"id":1,"words":2}'),
    ):
        error = error_of(path)
        assert error.what == "no column any of prompt, Prompt, caption, text"
        assert error.why == "found: id, words"


def test_a_missing_prompt_in_parquet_names_its_row(tmp_path: Path):
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "a.parquet")
    assert error_of(str(tmp_path / "a.parquet")).where == f"{tmp_path / 'a.parquet'}, row 1"


def test_draws_use_every_prompt_once_before_any_again():
    prompts = [f"p{i}" for i in range(10)]
    source = PromptSource(prompts, seed=3)
    drawn = [prompt for iteration in range(5) for prompt in source.draw(iteration, 4)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == prompts
    assert drawn[:10] != drawn[10:]


def test_a_draw_depends_on_seed_and_iteration_only():
    prompts = [f"p{i}" for i in range(10)]
    source = PromptSource(prompts, seed=3)
    for iteration in (0, 9, 4):
        source.draw(iteration, 4)
    assert source.draw(7, 4) == PromptSource(prompts, seed=3).draw(7, 4)
    assert source.draw(7, 4) != PromptSource(prompts, seed=4).draw(7, 4)


def test_more_prompts_than_there_are_can_be_drawn():
    drawn = PromptSource(["a", "b", "c"], seed=0).draw(2, 9)
    assert sorted(drawn) == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_nothing_can_be_drawn_from_nothing():
    with pytest.raises(DataError, match="no prompts"):
        PromptSource([], seed=0)
