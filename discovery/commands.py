"""What `emotion-atlas concepts list | check` and `corpora list | check` do."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

from discovery.concepts import DEFAULT, concept_sets, load_concepts
from discovery.corpora.source import Source, SourceRole
from saes import config
from saes.errors import UserError
from saes.tables import markdown

ROLE_HELP = (
    "selection, confirmation, split (halves of these two, by group and writer), crossfit (the only "
    "corpus, cross-fitted), situations, neutral, lexical"
)
SHOWN = 10  # texts that name their concept, in a report


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `concepts` and `corpora` with their sub-commands to the sub-parsers of the front door."""
    group = commands.add_parser("concepts", help="the concept sets, and checks of your own")
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser("list", help="the shipped sets, or the concepts of one")
    one.add_argument("set", nargs="?", metavar="SET", help="a shipped set or a YAML file")
    one.add_argument("--json", action="store_true", help="as JSON")
    one = actions.add_parser("check", help="read a concept set and say what is in it")
    one.add_argument("set", metavar="SET", help="a YAML file, or a shipped set")
    group = commands.add_parser("corpora", help="the label mappings, and checks of your texts")
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser("list", help="the shipped mappings from labels to concepts")
    one.add_argument("--json", action="store_true", help="as JSON, with all that they say")
    one = actions.add_parser(
        "check", help="read texts and say how many there are of each concept, and which name it"
    )
    one.add_argument(
        "corpus", metavar="CORPUS",
        help="the config of a run (.yaml), packaged, a folder of its five files, a CSV, TSV, JSONL "
        "or Parquet file, or a dataset of the hub",
    )  # fmt: skip
    _add_columns(one)
    one.add_argument("--concepts", metavar="SET", help=f"a shipped set or a file ({DEFAULT})")
    one.add_argument("--seed", type=int, metavar="N", help="of the split (0)")
    one.add_argument("--json", action="store_true", help="as JSON, with every text that leaks")


def add_source(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a corpus of one's own on a command line: `--corpus FILE` and what
    goes with it. `sources` reads them."""
    parser.add_argument(
        "--corpus", metavar="FILE",
        help="texts in the place of the config's corpora: a CSV, TSV, JSONL or Parquet file, or a "
        "dataset of the hub; with the packaged neutral texts",
    )  # fmt: skip
    _add_columns(parser)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    roles = [role for role in get_args(SourceRole) if role != "all"]
    parser.add_argument(
        "--role", choices=roles, metavar="ROLE", help=f"{ROLE_HELP}; split if not said"
    )
    parser.add_argument(
        "--mapping",
        metavar="NAME",
        help="how labels become concepts: a shipped name or a YAML file",
    )
    for name, what in (
        ("text", "of the text (text)"),
        ("label", "of the label (label)"),
        ("group", "of the topic: texts are compared within it"),
        ("writer", "of the writer, who is never split"),
        ("id", "of a name that no other text has (the line)"),
        ("set", "of the role of each text, in the place of --role"),
    ):
        parser.add_argument(f"--{name}-column", metavar="NAME", help=f"column {what}")
    parser.add_argument(
        "--span-columns", nargs=2, metavar=("FIRST", "END"),
        help="columns of the first character that the label is about and of the one after the last",
    )  # fmt: skip
    parser.add_argument("--language", metavar="CODE", help="of the texts, as de (en)")
    parser.add_argument("--hub-config", metavar="NAME", help="configuration of a hub dataset")
    parser.add_argument("--hub-split", metavar="NAME", help="its split (train)")
    parser.add_argument("--revision", metavar="NAME", help="its branch, tag or commit")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many texts")
    parser.add_argument(
        "--near-duplicates", type=float, metavar="SHARE",
        help="leave a text out whose overlap with one of another role is at least this (0.8)",
    )  # fmt: skip


def sources(args: argparse.Namespace) -> list[dict[str, object]]:
    """The `corpora` of a config that the options of `add_source` stand for: the corpus, and the
    packaged neutral texts unless the corpus brings its own. Empty without `--corpus`.

    Raises:
        UserError: another of these options without `--corpus`.
    """
    if args.corpus is None:
        for one in fields(Source):
            if one.name != "source" and getattr(args, one.name) is not None:
                raise UserError(
                    f"--{one.name.replace('_', '-')} says something of --corpus, which is not "
                    "given; add --corpus FILE, or write it into the corpora of the config"
                )
        return []
    source = _source(args)
    if source.role in ("split", "crossfit"):
        return [config.to_dict(source), config.to_dict(Source("packaged", "neutral"))]
    return [config.to_dict(source)]


def _source(args: argparse.Namespace) -> Source:
    folder = args.corpus == "packaged" or Path(args.corpus).expanduser().is_dir()
    names = [one.name for one in fields(Source) if one.name not in ("source", "role")]
    values = {name: value for name in names if (value := getattr(args, name)) is not None}
    role = args.role or ("all" if folder or "set_column" in values else "split")
    return config.load(Source, {"source": args.corpus, "role": role, **values}, "--corpus")


def dispatch(args: argparse.Namespace) -> None:
    """Do what a command line of `add_parsers` asks for.

    Raises:
        UserError: anything that the user can mend.
    """
    actions = {
        ("concepts", "list"): _list_concepts,
        ("concepts", "check"): _check_concepts,
        ("corpora", "list"): _list_corpora,
        ("corpora", "check"): _check_corpora,
    }
    actions[args.command, args.action](args)


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")


# -------------------------------------------------------------------------------------- concepts


def _list_concepts(args: argparse.Namespace) -> None:
    if args.set is not None:
        concepts = load_concepts(source=args.set)
        if args.json:
            _say(json.dumps([vars(c) for c in concepts], indent=1, ensure_ascii=False))
            return
        cells = [["concept", "family", "antonym", "definition"]]
        cells += [[c.name, c.family, c.antonym or "–", c.definition or "–"] for c in concepts]
        _say(markdown(cells, left=4))
        return
    about = concept_sets()
    sizes = {name: len(load_concepts(source=name)) for name in about}
    if args.json:
        rows = [{"set": n, "concepts": sizes[n], "about": about[n]} for n in about]
        _say(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    cells = [["set", "what", "concepts"]]
    cells += [[name, text, str(sizes[name])] for name, text in about.items()]
    _say(f"{markdown(cells, left=2)}\nThe concepts of one: emotion-atlas concepts list NAME")


def _check_concepts(args: argparse.Namespace) -> None:
    concepts = load_concepts(source=args.set)
    if len(concepts) < 3:
        raise UserError(
            f"{args.set} names {len(concepts)} concepts; each is judged against others: name 3"
        )
    families = Counter(concept.family for concept in concepts)
    forms = [len(concept.inflections) for concept in concepts]
    counts = {
        "definition": sum(c.definition is not None for c in concepts),
        "prompts": sum(bool(c.prompts) for c in concepts),
        "antonym": sum(c.antonym is not None for c in concepts),
        "valence": sum(c.valence is not None for c in concepts),
    }
    lines = [
        ("concepts", f"{len(concepts)}: {_short([c.name for c in concepts])}"),
        ("families", f"{len(families)}: {_short([f'{f} ({n})' for f, n in families.items()])}"),
        ("word forms", f"{sum(forms)}, {min(forms)} to {max(forms)} a concept"),
        *((f"with {name}", f"{n} of {len(concepts)}") for name, n in counts.items()),
        ("verdict", "fits"),
    ]
    _say("".join(f"{name:<20}{value}\n" for name, value in lines))


def _short(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + rest


# --------------------------------------------------------------------------------------- corpora


def _list_corpora(args: argparse.Namespace) -> None:
    from discovery.corpora.mappings import describe

    every = describe()
    if args.json:
        rows = [{"mapping": name, **config.to_dict(m)} for name, m in every.items()]
        _say(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    cells = [["mapping", "of", "to the concept sets"]]
    for name, mapping in every.items():
        sets = ", ".join(mapping.sets or ()) or ("any, by its words" if mapping.free else "–")
        cells.append([name, mapping.about, sets])
    _say(
        f"{markdown(cells, left=3)}\nThe packaged corpus (source: packaged) needs none. "
        "How to write one: docs/corpora.md"
    )


@dataclass(frozen=True)
class _ConceptsPart:
    """The concepts of a config."""

    set: str = DEFAULT
    names: tuple[str, ...] = ()
    missing: Literal["error", "leave out"] = "error"


@dataclass(frozen=True)
class _ConfigPart:
    """What `corpora check` reads of the config of a run."""

    corpora: tuple[Source, ...] = (Source("packaged"),)
    concepts: _ConceptsPart = field(default_factory=_ConceptsPart)
    seed: int = 0


def _check_corpora(args: argparse.Namespace) -> None:
    from discovery.corpora.summary import as_json, check, in_words

    if Path(args.corpus).suffix in (".yaml", ".yml"):
        _check_config_alone(args)
        tree = config.read(Path(args.corpus).expanduser())
        keys = ("corpora", "concepts", "seed")
        part = config.load(_ConfigPart, {key: tree[key] for key in keys if key in tree})
        concepts = load_concepts(part.concepts.names or None, part.concepts.set)
        known = load_concepts(source=part.concepts.set)
        checked = check(part.corpora, concepts, known, part.seed, part.concepts.missing, True)
    else:
        concepts = load_concepts(source=args.concepts or DEFAULT)
        given = [config.load(Source, one, "--corpus") for one in sources(args)]
        checked = check(given, concepts, concepts, args.seed or 0, "leave out")
    _say(as_json(checked) if args.json else in_words(checked, SHOWN))


def _check_config_alone(args: argparse.Namespace) -> None:
    """Refuse options beside a config, which says all that they could say."""
    places = {one.name: "the corpora of the config" for one in fields(Source)}
    del places["source"]
    for name, place in {**places, "concepts": "the config", "seed": "the config"}.items():
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is for a single source; write it into {place}")
