"""Problems from files: every format, the mapping of fields, errors that name the row, and what is held out."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amalgam.errors import UserError
from amalgam.rewards.data import FileDomain, read
from amalgam.rewards.grader import Grader

ROWS = [
    {"problem": f"What is {i} + {i}?", "solution": {"value": str(2 * i)}, "said": f"\\boxed{{{2 * i}}}"}
    for i in range(20)
]
FIELDS = {"question": "problem", "answer": "solution.value", "demonstration": "said"}


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return str(path)


def domain(folder: Path, train: list, heldout: list, fields: dict | None = None, **more) -> FileDomain:
    files = jsonl(folder / "train.jsonl", train), jsonl(folder / "heldout.jsonl", heldout)
    settings = {"rewards": {"math": 1}, "demonstrations": 8, "seed": 0, **more}
    return FileDomain("d", "chat", *files, FIELDS if fields is None else fields, **settings)


def test_every_format_gives_the_same_problems(tmp_path):
    lines = jsonl(tmp_path / "a.jsonl", ["", *ROWS])
    table = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), table)
    loaded = {"path": "json", "data_files": lines, "split": "train", "cache_dir": str(tmp_path / "cache")}
    found = [read(source, FIELDS, "d") for source in (lines, table, loaded)]
    assert [[row.fields for row in rows] for rows in found] == [found[0] and [row.fields for row in found[0]]] * 3
    assert [row.number for row in found[0]] == list(range(2, 22))  # lines of the file
    assert [row.number for row in found[1]] == [row.number for row in found[2]] == list(range(1, 21))
    assert found[0][3].fields["answer"] == "6"


def test_splits_are_apart_and_repeat(tmp_path):
    rows = domain(tmp_path, ROWS[:15], ROWS[15:])
    assert (rows.demonstrations, rows.heldout) == (8, 5)
    shown, held = rows.problems("demonstrations", 0, 8), rows.problems("validation", 0, 7)
    assert sorted(p.index for p in [*shown, *held]) == list(range(1, 16))
    assert rows.demonstration(shown[0]) == f"\\boxed{{{shown[0].answer}}}"
    assert [p.index for p in rows.problems("heldout", 2, 99)] == [3, 4, 5]
    first, second = rows.problems("train", 0, 15), rows.problems("train", 15, 15)
    assert {p.index for p in first} == {p.index for p in second} == set(range(1, 16))
    assert [p.index for p in first] != [p.index for p in second]
    assert rows.problems("train", 10, 10) == [*first[10:], *second[:5]]
    assert rows.messages(first[0]) == [{"role": "user", "content": first[0].question}]
    assert (first[0].domain, first[0].task, first[0].rewards) == ("d", "train.jsonl", {"math": 1})
    with pytest.raises(UserError, match=r"domains\.d: 8 rows for validation are not there, with 8 for others of 15"):
        rows.problems("validation", 0, 8)


def test_problems_of_files_are_graded(tmp_path):
    problems = domain(tmp_path, ROWS, ROWS[:1]).problems("train", 0, 3)
    with Grader() as grader:
        scores = grader.grade(
            [(p, p.entry["said"] if i else "\\boxed{x}", True, "chat") for i, p in enumerate(problems)]
        )
    assert [score.correct for score in scores] == [False, True, True]


def test_what_is_held_out_is_not_trained_on(tmp_path):
    twin = {**ROWS[3], "problem": ROWS[3]["problem"].upper().replace(" ", "\n ")}
    rows = domain(tmp_path, ROWS[:6], [ROWS[9], twin, ROWS[5]])
    assert rows.duplicates == [(4, 2), (6, 3)]
    assert rows.described_duplicates().startswith(
        "2 training rows are held out, too, and left out: row 4 (held-out row 2)"
    )
    assert {p.index for p in rows.problems("train", 0, 8)} == {1, 2, 3, 5}
    with pytest.raises(UserError, match="every training row is held out, too"):
        domain(tmp_path, ROWS[:2], ROWS[:2])


def test_a_row_may_be_a_chat(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = domain(tmp_path, [{"messages": chat, "answer": 2}], [{"question": "x", "answer": "1"}], fields={})
    (problem,) = rows.problems("train", 0, 1)
    assert (rows.messages(problem), problem.question, problem.answer) == (chat, "1 + 1?", "2")
    with pytest.raises(UserError, match=r"train\.jsonl: row 1: no text in the field 'demonstration', which SFT learns"):
        rows.problems("demonstrations", 0, 1)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([ROWS[0], "{broken"], FIELDS, "train.jsonl: row 2: no JSON: "),
        ([ROWS[0], "[1]"], FIELDS, "train.jsonl: row 2: [1] is no object"),
        (
            [ROWS[0], {"problem": "x"}],
            FIELDS,
            "train.jsonl: row 2: no field 'solution.value' (d.fields.answer); it has problem",
        ),
        ([{"q": "x"}], {}, "train.jsonl: row 1: no field 'question', nor messages; it has q; name it in fields"),
        ([{"question": 3}], {}, "train.jsonl: row 1: question is 3, and no text"),
        ([{"question": " "}], {}, "train.jsonl: row 1: question is ' ', and no text"),
        ([{"messages": [{"role": "user"}]}], {}, "train.jsonl: row 1: messages has to be a list of"),
        ([], {}, "train.jsonl: has no rows"),
    ],
)
def test_a_bad_row_is_named(tmp_path, rows, fields, message):
    with pytest.raises(UserError) as error:
        read(jsonl(tmp_path / "train.jsonl", rows), fields, "d")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no.jsonl", "d: no file 'no.jsonl'"),
        ("rows.csv", "d: 'rows.csv' is no .jsonl or .parquet; for others give datasets' arguments"),
        ({"path": "json", "data_files": "/no/such/file.json"}, "d: datasets cannot load"),
        ({"path": "json", "nonsense": 1}, "d: datasets cannot load"),
    ],
)
def test_a_source_that_is_none_is_named(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where `datasets` looks for files
    with pytest.raises(UserError, match=r"^d: ") as error:
        read(source, {}, "d")
    assert message in str(error.value)


def test_a_torn_parquet_is_named_and_a_dataset_needs_a_split(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"x\.parquet: no Parquet"):
        read(str(tmp_path / "x.parquet"), {}, "d")
    lines = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match="has the splits train; add split: NAME"):
        read({"path": "json", "data_files": lines, "cache_dir": str(tmp_path / "cache")}, {}, "d")


def test_a_field_that_a_reward_grades_by_is_missed_before_anything_starts(tmp_path):
    with pytest.raises(
        UserError, match=r"train\.jsonl: row 1: no field 'schema', which json grades by; it has .*fields"
    ):
        domain(tmp_path, ROWS, ROWS[:1], rewards={"json": 1})
    with pytest.raises(UserError, match=r"domains\.d\.rewards\.maths: no reward"):
        domain(tmp_path, ROWS, ROWS[:1], rewards={"maths": 1})
