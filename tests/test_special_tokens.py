"""One model with its tokenizer, through the commands: what starts, ends and pads."""

import json
import shutil

import jax
import numpy as np
import pytest

from jalign import cli, data, models
from jalign.data.special_tokens import settle_pad_token
from jalign.pretrained import load_pretrained
from tests.data.conftest import CHATML, MARKED, assistant, make_tokenizer, user
from tests.models import tiny

CHAT = [{"messages": [user("Hi"), assistant("ok")]}] * 4
PLAIN = [{"prompt": "Hi", "completion": " there"}] * 4
RUN = ("--steps", "1", "--batch-size", "4", "--max-length", "32", "--mesh", "fsdp=1")


def make_model(path, tokenizer, *, config=None, generation=None, weights=None, **sizes):
    """A tiny checkpoint; config and generation are changes of its JSON files."""
    sizes = {"vocab_size": len(tokenizer), "num_layers": 1, "bos_token_id": 1} | sizes
    sizes = tiny.SIZES | {"eos_token_ids": (2,)} | sizes
    model = models.Model(models.ModelConfig(**sizes))
    params = model.init(jax.random.key(0))
    models.save(path, model, weights(model, params) if weights else params, tokenizer)
    for name, changes in (("config", config), ("generation_config", generation)):
        file = path / f"{name}.json"
        values = json.loads(file.read_text()) | (changes or {})
        file.write_text(json.dumps(values))
    return path


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def command(monkeypatch, capsys):
    """jalign's command in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(cli, "start_jax", lambda launch: None)

    def run(*args):
        code = cli.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run


def exported(folder):
    """config.json, generation_config.json, tokenizer_config.json."""
    names = ("config", "generation_config", "tokenizer_config")
    return [json.loads((folder / f"{name}.json").read_text()) for name in names]


def test_what_a_template_ends_a_turn_with_is_trained_exported_and_stops(
    command, tmp_path, write_jsonl
):
    """A base model whose EOS is another token than its template's end of a turn."""
    tokenizer = make_tokenizer(bos=False, eos="</s>", chat_template=CHATML)
    end, eos = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])

    def say_the_end(model, params):
        # Every state gives the end of a turn by far the largest logit.
        hidden, _ = model.apply(params, np.array([[40, 41]], np.int32))
        kernel = np.zeros_like(params["unembed"]["kernel"])
        kernel[:, end] = 40 * np.asarray(hidden)[0, -1]
        return params | {"unembed": {"kernel": jax.numpy.asarray(kernel)}}

    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    settings |= {"transformers_version": "4.51.0"}
    folder = make_model(
        tmp_path / "m", tokenizer, generation=settings, weights=say_the_end
    )
    rows = write_jsonl(CHAT)
    code, *_ = command(
        "sft", "--model", folder, "--data", rows, "--out", tmp_path / "o", *RUN,
        "--learning-rate", "0",
    )  # fmt: skip
    assert code == 0
    config, generation, names = exported(tmp_path / "o" / "model")
    assert config["eos_token_id"] == generation["eos_token_id"] == [eos, end]
    assert config["pad_token_id"] == generation["pad_token_id"] not in (eos, end)
    kept = {k: generation[k] for k in ("temperature", "top_p", "do_sample")}
    assert kept == {"temperature": 0.6, "top_p": 0.9, "do_sample": True}
    # What both transformers 4 and 5 know.
    assert names["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in names

    code, text, _ = command(
        "generate", "--model", tmp_path / "o" / "model", "--chat", "--prompt", "Hi",
        "--temperature", "0", "--max-new-tokens", "8", "--mesh", "fsdp=1",
    )  # fmt: skip
    assert (code, text) == (0, "\n")  # the end at once, and no word of it in the text
    code, text, _ = command(
        "eval", "--model", tmp_path / "o" / "model", "--data", rows, "--mesh", "fsdp=1",
        "--ref-model", folder, "--max-new-tokens", "8", "--max-length", "32",
    )  # fmt: skip
    result = json.loads(text)
    assert code == 0 and result["kl_num_tokens"] == 4  # one token for each of 4 rows
    assert result["num_tokens"] == 4 * len("ok|")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_named_template_called_default_is_taken(command, tmp_path, template):
    tokenizer = make_tokenizer(eos="<|im_end|>")
    tokenizer.chat_template = {
        "default": template,
        "tool_use": "TOOLS{{ tools }}" + template,
    }
    folder = make_model(tmp_path / "m", tokenizer, eos_token_ids=(4,))
    again = load_pretrained(folder).tokenizer
    assert again.chat_template["default"] == template
    (example, *_), _ = data.sft_examples(CHAT, again, max_length=64)
    assert again.decode(example.tokens[example.completion_mask]) == "ok<|im_end|>"
    (prompt, *_), _ = data.prompt_examples(
        [{"prompt": CHAT[0]["messages"][:1]}], again, max_prompt_length=64
    )
    n = int(np.argmax(example.completion_mask))
    assert prompt.tokens.tolist() == example.tokens[:n].tolist()
    # A row with tools has the template for tools, as transformers takes it.
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    (example, *_), _ = data.sft_examples(
        [CHAT[0] | {"tools": tools}], again, max_length=256
    )
    assert "TOOLS" in again.decode(example.tokens)


BAD_IDS = [
    ("config", {"eos_token_id": [2, 9999]}, "config.json: eos_token_id=[2, 9999]"),
    ("config", {"pad_token_id": -1}, "config.json: pad_token_id=-1"),
    ("config", {"bos_token_id": 1.5}, "config.json: bos_token_id=1.5"),
    ("generation", {"eos_token_id": 9999}, "generation_config.json: eos_token_id=9999"),
]


@pytest.mark.parametrize(("file", "changes", "message"), BAD_IDS)
def test_a_token_outside_the_vocabulary_is_named_by_its_file(
    file, changes, message, command, tmp_path
):
    folder = make_model(tmp_path / "m", make_tokenizer(), **{file: changes})
    code, _, text = command("generate", "--model", folder, "--prompt", "x")
    assert code == 2 and message in text and "Traceback" not in text


COMMANDS = {
    "sft": ("--model", "M", "--data", "D", "--out", "O", *RUN),
    "grpo": ("--model", "M", "--data", "D", "--out", "O", "--reward", "gsm8k", "--mesh",
             "fsdp=1", "--steps", "1", "--batch-size", "2", "--group-size", "2"),
    "eval": ("--model", "M", "--data", "D", "--mesh", "fsdp=1"),
    "generate": ("--model", "M", "--prompt", "x", "--mesh", "fsdp=1"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_what_does_not_belong_together(
    name, command, tmp_path, write_jsonl
):
    data_file = write_jsonl(PLAIN)

    def run(folder):
        places = {"M": folder, "D": data_file, "O": tmp_path / "o"}
        code, _, text = command(name, *(places.get(arg, arg) for arg in COMMANDS[name]))
        assert code == 2 and "Traceback" not in text, text
        return text

    small = make_model(tmp_path / "small", make_tokenizer(), vocab_size=100)
    assert f"{small}: the tokenizer gives ids up to" in run(small)
    bare = make_model(tmp_path / "bare", make_tokenizer())
    (bare / "tokenizer.json").unlink()
    names = json.loads((bare / "tokenizer_config.json").read_text())
    names["tokenizer_class"] = "LlamaTokenizer"
    (bare / "tokenizer_config.json").write_text(json.dumps(names))
    assert "is tokenizer.json missing?" in run(bare)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    assert f"{adapter}/adapter_config.json: peft_type=None" in run(adapter)
    if name != "eval":
        scalar = make_model(tmp_path / "scalar", make_tokenizer(), num_labels=1)
        assert "reward model" in run(scalar)


def test_eval_gives_no_number_that_is_none(command, tmp_path, write_jsonl):
    def huge(model, params):  # finite weights whose logits are not
        return params | {"norm": {"scale": params["norm"]["scale"] * 3e38}}

    folder = make_model(tmp_path / "m", make_tokenizer(), weights=huge)
    code, text, error = command(
        "eval", "--model", folder, "--data", write_jsonl(PLAIN), "--mesh", "fsdp=1"
    )
    assert code == 2 and not text and "no finite number" in error, (text, error)


def test_a_reference_of_another_vocabulary_is_refused(command, tmp_path, write_jsonl):
    folder = make_model(tmp_path / "m", make_tokenizer())
    other = make_model(tmp_path / "n", make_tokenizer(merges=[("a", "b")]))
    code, _, text = command(
        "eval", "--model", folder, "--ref-model", other, "--data", write_jsonl(PLAIN)
    )
    assert code == 2 and "different vocabularies" in text and "'ab'" in text


def test_a_home_folder_and_a_user_who_loads_both_parts(tmp_path, monkeypatch):
    folder = make_model(tmp_path / "m", make_tokenizer(chat_template=CHATML))
    monkeypatch.setenv("HOME", str(tmp_path))
    settled, _, tokenizer = load_pretrained("~/m")
    assert settled.config.eos_token_ids == (2, 4)
    # Loaded apart, the same tokens stop a completion.
    model, params = models.load("~/m")
    assert data.stop_tokens(data.load_tokenizer("~/m"), model.config.eos_token_ids) == [
        2,
        4,
    ]
    shutil.rmtree(folder)
    models.save(folder, model, params, tokenizer)
    config, generation, _ = exported(folder)
    assert config["pad_token_id"] == generation["pad_token_id"] == 0


def test_rows_beyond_the_context_are_warned_of(command, tmp_path, write_jsonl, caplog):
    folder = make_model(tmp_path / "m", make_tokenizer(), max_position=40)
    for length, warned in ((40, False), (41, True)):
        caplog.clear()
        code, *_ = command(
            "eval", "--model", folder, "--data", write_jsonl(PLAIN), "--mesh",
            "fsdp=1", "--max-length", length,
        )  # fmt: skip
        assert code == 0 and ("context is 40" in caplog.text) == warned


def test_pad_is_never_what_ends_an_answer():
    """Even where the vocabulary has no token meant for it."""
    from tokenizers import Tokenizer, models as kinds
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(kinds.WordLevel({"<end>": 0, "a": 1, "b": 2}, "a"))
    core.add_special_tokens(["<end>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    settle_pad_token(tokenizer)
    assert tokenizer.pad_token == "b"
    chat = make_tokenizer(pad="<|im_end|>", chat_template=CHATML)
    settle_pad_token(chat)
    assert chat.pad_token == "<unk>"


WRAPPED = {
    "chatml": CHATML,
    "marked": MARKED.replace("{{ eos_token }}", "{{ eos_token + '\\n' }}"),
    "lines": CHATML.replace("{% endfor %}", "{% endfor %}\n") + "\n",
    "dict": {"default": CHATML, "tool_use": CHATML},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_a_reward_models_template_ends_at_the_turn_and_asks_as_before(name):
    turns = [user("a"), assistant(" b \n")]
    before = make_tokenizer(eos="<|im_end|>", chat_template=WRAPPED[name])
    after = make_tokenizer(eos="<|im_end|>", chat_template=WRAPPED[name])
    data.end_template_at_turn(after)

    def text(tokenizer, messages, **how):
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)

    assert text(before, turns).endswith("<|im_end|>\n")
    assert text(after, turns) == text(before, turns).rstrip()
    assert text(after, turns).endswith("<|im_end|>")
    for how in ({"add_generation_prompt": True}, {"continue_final_message": True}):
        asked = turns[:1] if "add_generation_prompt" in how else turns
        assert text(after, asked, **how) == text(before, asked, **how)
    again = after.chat_template
    data.end_template_at_turn(after)
    assert after.chat_template == again
