"""A run goes on with what it was started with, wherever that lies now, and no other."""

import functools
import json
import shutil

import numpy as np
import pytest

from jalign import data, train
from jalign.train.inputs import examples_digest, function_digest
from tests.train import tiny, world

# The microseconds of the clock as words: no other moment gives the same tokens.
TEMPLATE = (
    "{% for x in strftime_now('%f') %}{{ 'abcdefghij'[x | int] ~ ' ' }}{% endfor %}"
    "{% for m in messages %}{{ m.content ~ ' ' }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A world of conversations, and an SFT run of two steps in it."""
    folder = world.make(tmp_path_factory.mktemp("world"))
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    rows = map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for row in rows:
            turns = (("user", row["prompt"]), ("assistant", row["completion"]))
            messages = [{"role": role, "content": text} for role, text in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    assert world.run("sft", folder, folder / "out") == 0
    return folder


@pytest.fixture
def again(begun, tmp_path, capsys):
    """(a copy of the world, the command again -> exit code, message)."""
    folder = shutil.copytree(begun, tmp_path / "copy")

    def run(*flags):
        code = world.run("sft", folder, folder / "out", *flags)
        return code, capsys.readouterr().err

    return folder, run


def test_equal_files_elsewhere_and_later_are_the_same_run(begun, again):
    folder, run = again
    before = world.weights(begun / "out")
    (folder / "rows.jsonl").rename(folder / "moved.jsonl")
    code, text = run("--data", str(folder / "moved.jsonl"))
    assert code == 0 and "continuing from step 2" in text
    after = world.weights(folder / "out")
    assert all((before[name] == after[name]).all() for name in before)


def test_rows_in_memory_go_on_where_their_file_was(begun, again, caplog):
    import datasets

    folder, _ = again
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    given = dict(model=str(folder / "model"), out=str(folder / "out"), steps=2)
    given |= dict(batch_size=4, max_length=16, mesh="fsdp=1")
    with caplog.at_level("INFO"):
        train.run_sft(data=datasets.DatasetDict(train=rows, test=rows), **given)
    assert "continuing from step 2" in caplog.text
    assert "data: split 'train', 12 rows" in caplog.text
    before, after = world.weights(begun / "out"), world.weights(folder / "out")
    assert all((before[name] == after[name]).all() for name in before)
    with pytest.raises(ValueError, match="the training rows changed"):
        train.run_sft(data=rows.select([1, 0, *range(2, 12)]), **given)
    with pytest.raises(ValueError, match="data row 2, field 'messages': .*not a list"):
        train.run_sft(data=[rows[0], {"messages": "x"}], **given)


def test_what_counts_of_a_function():
    def scale(prompts, completions, rows):
        return [1.0]

    same = function_digest(scale)
    assert same == function_digest(scale) != function_digest(lambda *batch: [1.0])
    halves = [
        function_digest(functools.partial(scale, rows=n)) for n in ([1], [2], [1])
    ]
    assert halves[0] == halves[2] and len({same, *halves}) == 3
    typed: dict = {}
    exec("def typed(completions, **kwargs): ...", typed)  # has no source
    assert len(function_digest(typed["typed"])) == 16


def change_rows(folder):
    world.write_rows(folder, count=16)


def other_rows(folder):
    world.write_rows(folder, first=3)


def other_weights(folder):
    name = "model.safetensors"
    shutil.copy(folder / "out" / "model" / name, folder / "model" / name)


def other_template(folder):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "model" / "chat_template.jinja").write_text(template)


def other_tokenizer(folder):
    file = folder / "model" / "tokenizer.json"
    raw = json.loads(file.read_text())
    raw["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_rows, "the training rows changed"),
        (other_rows, "the training rows changed"),
        (other_weights, "the model's weights changed"),
        (other_template, "the model's chat template changed"),
        (other_tokenizer, "the model's tokenizer changed"),
    ],
)
def test_another_input_under_the_same_name_is_refused_and_named(again, change, said):
    folder, run = again
    change(folder)
    code, text = run()
    assert code == 2 and said in text and "Traceback" not in text
    assert "--no-resume" in text


def test_more_steps_of_a_falling_rate_need_a_word(again):
    folder, run = again
    code, text = run("--steps", "4")
    assert code == 2 and "the number of steps was 2 and is 4" in text
    code, text = run("--steps", "4", "--reschedule")
    assert code == 0 and "continuing from step 2" in text
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_what_counts_of_an_example():
    examples = tiny.examples(5)
    prompt = data.PromptExample(np.arange(3, dtype=np.int32), "a", {"x": [1, None]})
    digest = examples_digest(examples)
    assert digest == examples_digest(tiny.examples(5))
    first = examples[0]
    masked = first._replace(completion_mask=~first.completion_mask)
    different = [
        examples[::-1],
        examples[:4],
        [masked, *examples[1:]],
        [prompt],
        [prompt._replace(row={"x": [1, "None"]})],
        [prompt._replace(row={"x": [None, 1]})],
        [prompt._replace(text="b")],
    ]
    assert len({digest, *map(examples_digest, different)}) == len(different) + 1
    # An object of no value of its own, such as an image, is no other one tomorrow.
    rows = [prompt._replace(row={"image": object()}) for _ in range(2)]
    assert examples_digest(rows[:1]) == examples_digest(rows[1:])
