"""What `emotion-atlas saes list | check | quality | push | pull` do.

Heavy packages are imported when a command needs them, so that help and `saes list` answer at once.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saes.errors import UserError
from saes.files import write_text
from saes.registry import Listed, list_saes
from saes.tables import markdown

if TYPE_CHECKING:
    import numpy as np

    from saes.check import Check
    from saes.lm.model import LM
    from saes.sources import Source

SAE_HELP = (
    "packaged/NAME, a folder, RELEASE/ID of sae-lens's registry, or OWNER/NAME[/FOLDER] of a hub "
    "repository; the formats of sae-lens, sparsify, dictionary_learning, Gemma Scope and Llama "
    "Scope are read"
)
MODEL_HELP = "the language model: hub name, folder, or packaged/demo_lm"


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `saes` and its sub-commands to the sub-parsers of the front door."""
    saes = commands.add_parser("saes", help="list, check, judge, publish and fetch SAEs")
    actions = saes.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser("list", help="released SAEs of sae-lens's registry; works offline")
    one.add_argument("--model", metavar="NAME", help="SAEs of this model; without it, all models")
    one.add_argument("--site", metavar="SITE", help="of this site, as blocks.5.hook_resid_post")
    one.add_argument("--json", action="store_true", help="as JSON, one object an SAE")
    one = actions.add_parser("check", help="does an SAE reconstruct this model's residuals?")
    one.add_argument("sae", metavar="SAE", help=SAE_HELP)
    _add_model(one)
    one.add_argument("--trust", action="store_true", help="end with 0 even if it fails")
    one = actions.add_parser("quality", help="figures of SAEs on held-out text")
    one.add_argument("saes", nargs="+", metavar="SAE", help=SAE_HELP)
    _add_model(one)
    one.add_argument(
        "--text", required=True, metavar="SOURCE",
        help="text that the SAEs were not trained on: a file (.txt, .jsonl, .parquet), a folder of "
        "such files, a dataset of the hub, or the `text` folder of a training run",
    )  # fmt: skip
    one.add_argument("--column", default="text", help="where the text is in a table (text)")
    one.add_argument("--rows", type=int, default=100, metavar="N", help="rows of text (100)")
    one.add_argument("--context", type=int, metavar="N", help="tokens of a row, BOS included (256)")
    one.add_argument("--trust", action="store_true", help="judge SAEs that fail the check too")
    one.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")
    one = actions.add_parser("push", help="publish an SAE with a card")
    one.add_argument("sae", metavar="FOLDER", help="its folder, or anything that can be loaded")
    one.add_argument(
        "destination", metavar="DESTINATION",
        help="OWNER/NAME[/FOLDER] of a hub repository, or a local folder that begins with ./",
    )  # fmt: skip
    one.add_argument("--licence", metavar="ID", help="for the card, as apache-2.0")
    one.add_argument("--public", action="store_true", help="a new repository is public")
    one.add_argument("--force", action="store_true", help="replace an SAE that is there")
    one = actions.add_parser("pull", help="fetch an SAE into a folder in sae-lens's format")
    one.add_argument("sae", metavar="SAE", help=SAE_HELP)
    one.add_argument("folder", type=Path, metavar="FOLDER", help="where it goes")
    one.add_argument("--force", action="store_true", help="replace another SAE that is there")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help=MODEL_HELP)
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="of the model (float32)",
    )  # fmt: skip
    parser.add_argument(
        "--quantize", choices=("8bit", "4bit"), help="load it quantised, through bitsandbytes"
    )
    parser.add_argument(
        "--device-map", choices=("auto",), help="spread it over all devices, instead of --device"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub name")


def dispatch(args: argparse.Namespace) -> None:
    """Do what a command line of `add_parsers` asks for.

    Raises:
        UserError: anything that the user can mend.
    """
    actions = {"list": _list, "check": _check, "quality": _quality, "push": _push, "pull": _pull}
    actions[args.action](args)


# ------------------------------------------------------------------------------------------ list


def _list(args: argparse.Namespace) -> None:
    rows = list_saes(args.model)
    if args.site is not None:
        rows = _at_site(rows, args.site)
    if args.json:
        _say(json.dumps([_record(row) for row in rows], indent=1))
    elif args.model is None and args.site is None:
        _say(_models(rows))
    else:
        _say(_rows(rows, args.model is None))


def _at_site(rows: Sequence[Listed], site: str) -> list[Listed]:
    found = [row for row in rows if row.site == site]
    if not found:
        sites = sorted({row.site for row in rows if row.site}, key=_natural)
        raise UserError(f"no SAE at {site!r}; there are some at {', '.join(sites) or 'no site'}")
    return found


def _natural(site: str) -> tuple[int, str]:
    return int(site.split(".")[1]), site


def _models(rows: Sequence[Listed]) -> str:
    """How many SAEs each model has."""
    counts = Counter(row.model for row in rows)
    usable = Counter(row.model for row in rows if row.loadable)
    releases = {model: {r.release for r in rows if r.model == model} for model in counts}
    cells = [["model", "releases", "SAEs", "of the residual stream"]]
    cells += [
        [model, str(len(releases[model])), f"{counts[model]:,}", f"{usable[model]:,}"]
        for model in sorted(counts, key=str.lower)
    ]
    return (
        f"{markdown(cells)}\n{len(rows):,} SAEs in {len(set().union(*releases.values()))} releases "
        "of sae-lens's registry; those of the residual stream can be loaded here.\n"
        "One model's: emotion-atlas saes list --model NAME"
    )


def _rows(rows: Sequence[Listed], with_model: bool) -> str:
    """A line an SAE: first those that can be loaded."""
    usable = sorted((r for r in rows if r.loadable), key=_order)
    head = ["SAE", *(["model"] if with_model else []), "site", "latents", "L0", "VE", "Neuronpedia"]
    cells = [head] + [
        [
            row.source,
            *([row.model] if with_model else []),
            str(row.site),
            f"{row.width:,}" if row.width else "?",
            f"{row.l0:.4g}" if row.l0 else "?",
            f"{row.variance_explained:.3f}" if row.variance_explained else "?",
            row.neuronpedia or "–",
        ]
        for row in usable
    ]
    rest = len(rows) - len(usable)
    others = f" ({rest:,} more read something else and cannot be loaded here)" if rest else ""
    if not usable:
        return f"None of these {len(rows):,} SAEs reads the residual stream; --json shows them."
    # some models go by a name that is not the hub's
    model = usable[0].model if "/" in usable[0].model else "MODEL"
    return (
        f"{markdown(cells, left=3 if with_model else 2)}\n{len(usable):,} SAEs of the residual "
        f"stream{others}. L0 and VE (variance explained) are their makers'; ? is unknown.\n"
        f"Try one:  emotion-atlas saes check {usable[0].source} --model {model}\n"
        f"Keep it:  emotion-atlas saes pull {usable[0].source} FOLDER"
    )


def _order(row: Listed) -> tuple[str, str, int, int, float, str]:
    layer, site = _natural(row.site or "blocks.0.")
    return row.model, row.release, layer, row.width or 0, row.l0 or 0.0, f"{site} {row.id}"


def _record(row: Listed) -> dict[str, Any]:
    return {**row._asdict(), "source": row.source, "loadable": row.loadable}


# --------------------------------------------------------------------------------- check, quality


def _load_lm(args: argparse.Namespace) -> "LM":
    from saes.subject import load_model

    return load_model(
        args.model,
        device=args.device,
        dtype=args.dtype,
        quantize=args.quantize,
        device_map=args.device_map,
        revision=args.revision,
    )


def _check(args: argparse.Namespace) -> None:
    from saes.check import require
    from saes.pretrained import load_checked
    from saes.sources import resolve

    resolve(args.sae)  # a name that means nothing is found before a model is loaded
    check = load_checked(args.sae, _load_lm(args), trust=True).check
    _say(_verdict(check))
    require(check, args.trust)


def _verdict(check: "Check") -> str:
    """The outcome, line by line, with every mistake that was tried when it is bad."""
    low, high = check.l0_range
    lines = [
        ("SAE", check.source),
        ("site", check.site),
        ("tokens", f"{check.tokens:,}"),
        ("variance explained", f"{check.variance_explained:.3f} (at least {check.needed:.2f})"),
        ("L0", f"{check.l0:.1f} ({low:.4g} to {high:.4g})"),
        ("verdict", "fits" if check.ok else "does not fit"),
    ]
    if not check.ok:
        lines.append(("probable cause", check.cause or "none of the simple ones"))
    text = "".join(f"{name:<20}{value}\n" for name, value in lines)
    if check.tried:
        cells = [["tried", "how", "VE", "L0"]]
        cells += [
            [t.cause, t.detail, f"{t.variance_explained:.3f}", f"{t.l0:.1f}"] for t in check.tried
        ]
        text += f"\n{markdown(cells, left=2)}"
    return text.rstrip("\n")


def _quality(args: argparse.Namespace) -> None:
    from saes.pretrained import load_checked
    from saes.quality import qualities, quality_table
    from saes.sources import resolve

    if args.rows < 1:
        raise UserError(f"--rows {args.rows}: at least one row of text is needed")
    if args.json is not None:
        _check_writable(args.json)
    sources = _different([resolve(name) for name in args.saes])
    lm = _load_lm(args)
    loaded = {
        name: load_checked(source.given, lm, trust=args.trust).dictionary
        for name, source in sources.items()
    }
    rows, text = _text(lm, args)
    results = qualities(lm, loaded, rows)
    _say(f"Held-out text: {text}\n\n{quality_table(results)}\n± is one standard error over rows.")
    if args.json is not None:
        record = {
            "model": lm.name,
            "text": text,
            "context": rows.shape[1],
            "saes": {
                name: {"site": loaded[name].site, "held_out": _numbers(figures._asdict())}
                for name, figures in results.items()
            },
        }
        write_text(args.json.expanduser(), json.dumps(record, indent=1) + "\n")


def _check_writable(path: Path) -> None:
    """Refuse a file that could not be written once everything is computed."""
    path = path.expanduser()
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: no folder {path.parent}; make it first")
    if path.is_dir():
        raise UserError(f"--json {path} is a folder; name a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--json {path} cannot be written: {error.strerror or error}") from None


def _different(sources: "Sequence[Source]") -> "dict[str, Source]":
    """SAEs by a name that may be written down, each its own.

    Raises:
        UserError: one of them is there twice.
    """
    named: dict[str, Source] = {}
    seen: dict[Path, Source] = {}
    for source in sources:
        path = source.path.resolve()
        if path in seen:
            raise UserError(
                f"SAE {source.given} is given twice (also as {seen[path].given}); leave one out"
            )
        seen[path] = source
        same = sum(other.name == source.name for other in named.values())
        named[f"{source.name} ({same + 1})" if same else source.name] = source
    return named


def _numbers(figures: dict[str, int | float]) -> dict[str, int | float | None]:
    """JSON knows no NaN."""
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def _text(lm: "LM", args: argparse.Namespace) -> "tuple[np.ndarray, str]":
    """Rows of tokens, each with its BOS, and where they are from in words."""
    import numpy as np

    from saes.text.documents import Source, pieces
    from saes.text.prepare import (
        MANIFEST,
        TextConfig,
        open_tokens,
        tokenizer_hash,
        write_tokens,
    )

    folder = Path(args.text).expanduser()
    if (folder / MANIFEST).is_file():
        tokens = open_tokens(folder)
        spread = np.linspace(0, len(tokens.held_out) - 1, min(args.rows, len(tokens.held_out)))
        rows, bos, text = tokens.held_out[spread.astype(int)], tokens.bos, tokens.text
        if args.context is not None and args.context != tokens.context:
            raise UserError(
                f"the rows of {args.text} have {tokens.context} tokens; leave out --context"
            )
        if tokens.tokenizer != tokenizer_hash(lm.tokenizer):
            raise UserError(
                f"{args.text} was written with another tokenizer than that of {lm.name}; give it "
                "text of its own"
            )
    else:
        context = min(256, lm.context) if args.context is None else args.context
        if context < 2:
            raise UserError(f"--context {context}: a row is BOS and at least one token")
        config = TextConfig(
            source=args.text,
            column=args.column,
            tokens=args.rows * (context - 1),
            held_out_tokens=0,  # all of it is
            context=context,
        )
        source = Source(args.text, args.column, config.split, None, config.document)
        next(pieces(source), None)  # so that a source which cannot be read is said at once
        with tempfile.TemporaryDirectory() as work:
            tokens = write_tokens(Path(work) / "tokens", lm, config)
            rows, bos, text = np.array(tokens.train[: args.rows]), tokens.bos, tokens.text
    if len(rows) == 0:
        raise UserError(f"{args.text} holds no held-out rows; give another text")
    rows = rows.astype(np.int64)
    if bos is not None:
        rows = np.concatenate([np.full((len(rows), 1), bos), rows], axis=1)
    return rows, text


# ------------------------------------------------------------------------------------ push, pull


def _push(args: argparse.Namespace) -> None:
    from saes.hub import push

    place = push(
        args.sae, args.destination, licence=args.licence, public=args.public, force=args.force
    )
    _say(f"{args.sae} is now {place}\nLoad it:  emotion-atlas saes check {place} --model MODEL")


def _pull(args: argparse.Namespace) -> None:
    from saes.hub import pull

    folder = pull(args.sae, args.folder.expanduser(), force=args.force)
    _say(f"{args.sae} is now in {folder}\nTry it:  emotion-atlas saes check {folder} --model MODEL")


def _say(text: str) -> None:
    sys.stdout.write(text.rstrip("\n") + "\n")
