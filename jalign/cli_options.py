"""The options of a command: flat flags from nested config dataclasses, and their help.

tyro parses and prints; what it is given is made here, so that the help speaks of
flags and groups, and not of Python's None, fields and dotted names.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from jalign.settings import nested
from jalign.train.loss_table import REGISTRY

# Field of a nested config, or base class whose fields stand apart -> its heading; other
# nested configs are called as their field.
HEADINGS = {
    "DataOptions": "data",
    "PlanOptions": "plan",
    "optim": "optimizer",
    "lora": "adapters",
    "compute": "memory and time",
    "kl": "KL penalty",
    "rewards": "reward shaping",
}
MAIN = "run"
EXAMPLES = {
    "demo": "--out runs/demo",
    "sft": "--model MODEL --data rows.jsonl --out runs/sft --steps 1000",
    "reward": "--model runs/sft/model --data pairs.jsonl --out runs/reward",
    "dpo": "--model runs/sft/model --data pairs.jsonl --out runs/dpo --beta 0.1",
    "ppo": "--model runs/sft/model --reward runs/reward/model --data prompts.jsonl "
    "--out runs/ppo",
    "grpo": "--model runs/sft/model --reward rewards.py:score --data prompts.jsonl "
    "--out runs/grpo --group-size 8",
    "generate": '--model runs/dpo/model --prompt "What is a prime?" --chat',
    "eval": "--model runs/dpo/model --ref-model runs/sft/model --data pairs.jsonl",
    "merge": "--model MODEL --adapter runs/dpo/adapter --out runs/merged",
    "plan": '--model MODEL --topology v5e:4x4 --mesh "fsdp=16" --batch-size 64',
}


class Option(NamedTuple):
    """A field of a config as a flag.

    Attributes:
      name: of the field.
      kind: its type.
      default: dataclasses.MISSING where it has to be given.
      text: its docstring, in one line.
    """

    name: str
    kind: Any
    default: Any
    text: str


class Group(NamedTuple):
    """Options under one heading, and what its class says of them."""

    text: str
    options: list[Option]


def groups_of(config_class: type, heading: str, made: Any = None) -> dict[str, Group]:
    """Heading -> its options.

    Args:
      config_class: a dataclass; nested ones are opened.
      heading: of the class's own fields.
      made: an instance, whose values are the defaults; None takes the fields' own.
    """
    hints, texts = typing.get_type_hints(config_class), docstrings_of(config_class)
    apart = {
        name: (HEADINGS[base.__name__], base)
        for base in config_class.__mro__[1:]
        if base.__name__ in HEADINGS
        for name in inspect.get_annotations(base)
    }
    found = {heading: Group(first_paragraph(config_class), [])}
    inner = []
    for field in dataclasses.fields(config_class):
        default = default_of(field) if made is None else getattr(made, field.name)
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            title = HEADINGS.get(field.name, field.name.replace("_", " "))
            inner.append(groups_of(kind, title, default))  # type: ignore[arg-type]
            continue
        title, owner = apart.get(field.name, (heading, config_class))
        group = found.setdefault(title, Group(first_paragraph(owner), []))
        text = texts.get(field.name, "")
        group.options.append(Option(field.name, kind, default, text))
    for more in inner:
        found |= more
    for group in found.values():  # what has to be given stands first
        group.options.sort(key=lambda o: o.default is not dataclasses.MISSING)
    return {title: group for title, group in found.items() if group.options}


def default_of(field: dataclasses.Field) -> Any:
    """A field's default; dataclasses.MISSING where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def docstrings_of(config_class: type) -> dict[str, str]:
    """Field -> the string that stands below it in the source, in one line."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        try:
            source = inspect.getsource(base)
        except OSError:  # of make_dataclass: its fields have their bases' texts
            continue
        (tree,) = ast.parse(textwrap.dedent(source)).body
        assert isinstance(tree, ast.ClassDef)
        for field, text in zip(tree.body, tree.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                if isinstance(text.value, ast.Constant):
                    words = str(text.value.value).split()
                    found[ast.unparse(field.target)] = " ".join(words)
    return found


def first_paragraph(config_class: type) -> str:
    """Of the class's docstring, in one line."""
    text = (config_class.__doc__ or "").partition("\n\n")[0]
    return " ".join(text.split())


def parse(
    command: str, args: list[str], config_class: type, launch_class: type
) -> tuple[Any, Any]:
    """(config, launch) of a command's words.

    Raises: SystemExit with 0 after --help, with 2 after a message about wrong flags;
      ValueError as the config classes do.
    """
    groups = groups_of(config_class, MAIN)
    groups |= groups_of(launch_class, "launch")
    known = {option.name for group in groups.values() for option in group.options}
    names = ", ".join(REGISTRY.get(command.split()[-1], ()))
    fields: list[Any] = [("config", _CONFIG, None)]
    for number, (heading, group) in enumerate(groups.items()):
        options = [
            option._replace(text=f"{option.text} Names: {names}.")
            if names and option.name == "loss"
            else option
            for option in group.options
        ]
        made = dataclasses.make_dataclass(
            f"Group{number}",
            [field_of(option, known) for option in options],
            kw_only=True,
            namespace={"__doc__": "" if heading == MAIN else group.text},
        )
        kind = Annotated[made, tyro.conf.arg(name=heading)]  # type: ignore[valid-type]
        fields.append((f"group{number}", kind))
    parsed: Any = tyro.cli(
        dataclasses.make_dataclass("Command", fields, kw_only=True),
        prog=f"jalign {command}",
        description=first_paragraph(config_class),
        args=args,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    values = {
        option.name: getattr(getattr(parsed, f"group{number}"), option.name)
        for number, group in enumerate(groups.values())
        for option in group.options
    }
    return nested(config_class, values), nested(launch_class, values)


# Never reaches tyro but as a line of the help: cli_yaml.expand_yaml has taken it out.
_CONFIG = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="FILE.yaml",
        help="Options from a file of `name: value` lines; flags win over it.",
        help_behavior_hint="",
    ),
]


def example(command: str) -> str:
    """A whole command line, cut into lines for a terminal between the options."""
    options = EXAMPLES[command.split()[0]]
    parts = re.split(r" (?=--)", f"jalign {command} {options}")
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(part) < 66:
            lines[-1] += f" {part}"
        else:
            lines.append(f"    {part}")
    return " \\\n".join(lines)


def field_of(option: Option, known: set[str]) -> tuple[str, Any, Any]:
    """The option as make_dataclass takes it, with its help for tyro.

    Args:
      option: what to ask for.
      known: the names of all options, which the help calls by their flags.
    """
    how: dict[str, Any] = {"help": speak_of_flags(option.text, known)}
    if option.default is None or option.default in ("", ()):
        how["help_behavior_hint"] = "(default: unset)"
    elif isinstance(option.default, bool):
        how["help_behavior_hint"] = f"(default: {'on' if option.default else 'off'})"
    told = told_kind(option.kind)
    kind = Annotated[told, tyro.conf.arg(**how)]
    if type(None) in typing.get_args(told):
        kind = Annotated[kind, optional(told)]
    return option.name, kind, dataclasses.field(default=option.default)


def told_kind(kind: Any) -> Any:
    """What of a type a command line can say: the text of `str | Path | list[dict]`,
    since paths are text there, and rows and functions are for Python."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    parts = typing.get_args(kind)
    if str not in parts or set(parts) <= {str, type(None)}:
        return kind
    return str | None if type(None) in parts else str


def optional(kind: Any) -> Any:
    """How tyro reads `X | None`: as X, in help and errors, but for the word None, by
    which a YAML file says that an option is unset.

    Args:
      kind: of str, int, float, bool or Literals.
    """
    (inner,) = (k for k in typing.get_args(kind) if k is not type(None))
    names = {"True": True, "False": False} if inner is bool else {}
    if typing.get_origin(inner) is Literal:
        names = {str(value): value for value in typing.get_args(inner)}
    elif inner not in (str, int, float, bool):
        raise TypeError(f"no flag can hold {kind}")

    def read(words: list[str]) -> Any:
        if words == ["None"]:
            return None
        if names and words[0] not in names:
            raise ValueError(f"{words[0]!r} is none of {', '.join(names)}")
        return names[words[0]] if names else inner(words[0])

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(names) + "}" if names else inner.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def speak_of_flags(text: str, known: set[str]) -> str:
    """Writes --max-length for max_length and `max_length`, outside of code such as
    "dpo:beta=0.1"."""

    def flag(match: re.Match) -> str:
        name = match[1] or match[2]
        return "--" + name.replace("_", "-") if name in known else match[0]

    names = r"`([a-z]\w*)`|(?<![\w:,./\[-])([a-z]+(?:_[a-z]+)+)(?![\w=])"
    return re.sub(names, flag, text)
