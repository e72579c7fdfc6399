"""The results of the trials as tables, figures and checks. Proportions have exact intervals."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats
from trials import BINS, LEVELS

from discovery.records import VERDICTS
from saes.tables import markdown

Results = Sequence[tuple[Any, Any]]
"""Tasks and what they gave."""


class Report(NamedTuple):
    """What one simulation showed."""

    text: str
    figures: dict[str, Any]
    """JSON-able."""
    checks: dict[str, bool]


class Share(NamedTuple):
    """A proportion with its exact 95 % interval (Clopper and Pearson 1934)."""

    k: int
    n: int
    low: float
    high: float

    @property
    def text(self) -> str:
        return (
            f"{self.k}/{self.n} = {self.k / max(self.n, 1):.3f} ({self.low:.3f} to {self.high:.3f})"
        )


def share(k: int, n: int) -> Share:
    """`k` of `n`; with none of none nothing is known."""
    if n == 0:
        return Share(0, 0, 0.0, 1.0)
    interval = stats.binomtest(k, n).proportion_ci(method="exact")
    return Share(k, n, float(interval.low), float(interval.high))


class Mean(NamedTuple):
    """A mean over trials with its Monte Carlo standard error."""

    mean: float
    error: float
    n: int

    @property
    def text(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


def mean(values: Sequence[float]) -> Mean:
    """With fewer than two values the error is infinite."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / n**0.5 if n > 1 else float("inf")
    return Mean(float(np.mean(values)) if n else float("nan"), error, n)


def proportions(pairs: Sequence[tuple[int, int]]) -> Mean:
    """The mean false-discovery proportion: 0 in a trial without discoveries."""
    return mean([false / all_ if all_ else 0.0 for false, all_ in pairs])


def within(rate: Mean, level: float = 0.05) -> bool:
    """Whether a mean is at most `level`, but for Monte Carlo error."""
    return rate.n < 2 or rate.mean <= level + float(stats.t.ppf(0.975, rate.n - 1)) * rate.error


def shuffled(results: Results) -> Report:
    """All labels shuffled."""
    own = [r for _, r in results]
    runs = len(own)
    concepts = sum(own[0]["verdicts"].values())
    any_ = share(sum(r["rejected"] > 0 for r in own), runs)
    words = share(sum(r["verdicts"]["lexical only"] > 0 for r in own), runs)
    counts = {v: sum(r["verdicts"][v] for r in own) for v in VERDICTS}
    bins = np.array([r["bins"] for r in own])
    below = np.array([r["below"] for r in own])
    uniform = [uniformity(bins[:, kind]) for kind in range(2)]
    rows = [["p-values of", *(f"p ≤ {level}" for level in LEVELS), "uniform: largest gap", "p"]]
    for kind, name in enumerate(("single latents", "sets")):
        shares = below[:, kind] / own[0]["tests"]
        cells = [mean(list(column)) for column in shares.T]
        gap, p = uniform[kind]
        rows.append([name, *(c.text for c in cells), f"{gap:.4f}", f"{p:.3f}"])
    text = (
        f"## Labels shuffled within topics: {runs} runs, {concepts} concepts\n\n"
        f"Runs with any discovery (step 5): {any_.text}.\n"
        f"Runs with any `lexical only` (step 9): {words.text}.\n"
        f"Verdicts over all runs: {', '.join(f'{v} {n}' for v, n in counts.items())}.\n\n"
        + markdown(rows)
    )
    figures = {
        "runs": runs,
        "any_discovery": any_._asdict(),
        "any_lexical_only": words._asdict(),
        "verdicts": counts,
        "uniform_p": {"singles": uniform[0][1], "sets": uniform[1][1]},
        "below": {
            name: {
                str(level): float(part)
                for level, part in zip(LEVELS, below[:, i].mean(0) / own[0]["tests"], strict=True)
            }
            for i, name in enumerate(("singles", "sets"))
        },
    }
    checks = {
        "shuffled: the share of runs with a discovery is consistent with 5 %": any_.low <= 0.05,
        "shuffled: that of runs with a lexical verdict too": words.low <= 0.05,
        "shuffled: smoothed p-values are uniform (p > 0.001)": min(p for _, p in uniform) > 0.001,
    }
    return Report(text, figures, checks)


def uniformity(bins: Float[np.ndarray, "runs bins"] | Any) -> tuple[float, float]:
    """The largest gap between the distribution of p-values and the uniform, and a test of it.

    P-values of one run share texts, so runs are the sample: Hotelling's test that the mean counts
    of a run are the same in `groups` bins, few enough for the number of runs.
    """
    runs = len(bins)
    shares = bins / bins.sum(1, keepdims=True)
    gap = float(np.abs(np.cumsum(shares.mean(0)) - np.arange(1, BINS + 1) / BINS).max())
    groups = 10 if runs >= 60 else 5 if runs >= 20 else 2
    if runs < 4:
        return gap, float("nan")
    merged = shares.reshape(runs, groups, -1).sum(2)[:, :-1] - 1 / groups
    d = groups - 1
    centre, covariance = merged.mean(0), np.atleast_2d(np.cov(merged.T))
    t2 = runs * float(centre @ np.linalg.solve(covariance, centre))
    return gap, float(stats.f.sf(t2 * (runs - d) / (d * (runs - 1)), d, runs - d))


def half(results: Results) -> Report:
    """Half of the concepts shuffled."""
    rates = _rates([r for _, r in results])
    text = f"## The labels of half of the concepts moved: {len(results)} runs\n\n" + _rate_table(
        rates
    )
    figures = {"runs": len(results), "rates": {k: r["rate"]._asdict() for k, r in rates.items()}}
    checks = {
        f"half: mean false-discovery proportion of {name}, at most 5 %": within(r["rate"])
        for name, r in rates.items()
    }
    return Report(text, figures, checks)


NAMES = {
    "tests": "tests (step 5)",
    "verdicts": "concepts of any such verdict (step 5)",
    "specific": "concepts found, or as a set (step 6)",
    "lexical": "words (step 9)",
}


def _rates(own: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By what is counted: the mean false-discovery proportion, and discoveries a run."""
    return {
        name: {
            "rate": proportions([r[kind] for r in own]),
            "found": mean([r[kind][1] for r in own]),
        }
        for kind, name in NAMES.items()
    }


def _rate_table(rates: dict[str, dict[str, Any]]) -> str:
    rows = [["of", "mean false-discovery proportion", "discoveries a run"]]
    rows += [[name, r["rate"].text, f"{r['found'].mean:.1f}"] for name, r in rates.items()]
    return markdown(rows)


def planted(results: Results) -> Report:
    """Planted worlds."""
    own = [r for _, r in results]
    table, right = Counter[tuple[str, float, str]](), Counter[float]()
    for r in own:
        table.update({(kind, strength, v): n for kind, strength, v, n in r["table"]})
        right.update(dict(r["right"]))
    strengths = sorted({s for kind, s, _ in table if kind == "planted"})
    rows = [["AUROC", "found", "right latent", "any", *VERDICTS[1:]]]
    recall: dict[str, Any] = {}
    for s in strengths:
        counts = [table["planted", s, v] for v in VERDICTS]
        n, any_ = sum(counts), share(sum(counts[:3]), sum(counts))
        own_share = share(counts[0], n)
        rows.append([f"{s:.2f}", f"{own_share.text}", f"{right[s] / n:.3f}", f"{any_.k / n:.3f}",
                     *(f"{c / n:.3f}" for c in counts[1:])])  # fmt: skip
        recall[str(s)] = {"found": own_share._asdict(), "any": any_._asdict()}
    kinds = [["planted as", *VERDICTS]]
    by_kind: dict[str, list[int]] = {}
    for kind in ("neighbour", "shared", "spread", "decoy", "nothing"):
        counts = [sum(n for (k, _, w), n in table.items() if (k, w) == (kind, v)) for v in VERDICTS]
        by_kind[kind] = counts
        kinds.append([kind, *(f"{c / max(sum(counts), 1):.3f}" for c in counts)])
    rates = _rates(own)
    decoys = share(by_kind["decoy"][3], sum(by_kind["decoy"][3:]))
    strong = share(recall.get("0.92", {}).get("found", {}).get("k", 0),
                   recall.get("0.92", {}).get("found", {}).get("n", 0))  # fmt: skip
    text = (
        f"## Planted worlds: {len(own)}\n\n{markdown(rows)}\n{markdown(kinds)}\n"
        f"Decoys called `lexical only` rather than `not found`: {decoys.text}.\n\n"
        + _rate_table(rates)
    )
    figures = {
        "worlds": len(own),
        "recall": recall,
        "kinds": {kind: dict(zip(VERDICTS, c, strict=True)) for kind, c in by_kind.items()},
        "rates": {k: r["rate"]._asdict() for k, r in rates.items()},
        "decoys_lexical": decoys._asdict(),
    }
    checks = {
        f"planted: mean false-discovery proportion of {name}, at most 5 %": within(r["rate"])
        for name, r in rates.items()
    }
    checks["planted: 95 % of features of AUROC .92 found"] = strong.high >= 0.95
    checks["planted: nine of ten lexical decoys called lexical"] = decoys.high >= 0.9
    return Report(text, figures, checks)


KINDS = {
    "tests": "tests",
    "found": "concepts of any such verdict",
    "specific": "concepts found, or as a set",
}


def few(results: Results) -> Report:
    """Few concepts represented: errors among tests, and among concepts."""
    own = [r for _, r in results]
    present = sum(r["concepts"] for r in own)
    rows = [["step 5", *(f"false: {name}" for name in KINDS.values()), "recall"]]
    figures: dict[str, Any] = {"worlds": len(own)}
    for rule in ("over concepts", "over tests"):
        rates = {kind: proportions([r[rule][kind] for r in own]) for kind in KINDS}
        recall = sum(r[rule]["hits"] for r in own) / present
        rows.append([rule, *(rate.text for rate in rates.values()), f"{recall:.3f}"])
        figures[rule] = {kind: rate._asdict() for kind, rate in rates.items()} | {"recall": recall}
    text = (
        f"## Worlds where few concepts are represented ({present / len(own):.0f}): {len(own)}\n\n"
        f"{markdown(rows)}"
    )
    checks = {
        f"few: mean false-discovery proportion of {name}, at most 5 %": within(
            proportions([r["over concepts"][kind] for r in own])
        )
        for kind, name in KINDS.items()
    }
    return Report(text, figures, checks)


def one_corpus(results: Results) -> Report:
    """The recipes for a user with one corpus."""
    rows = [["recipe", "corpus", "runs with a false discovery", "false-discovery proportion",
             "found at AUROC"]]  # fmt: skip
    figures, checks = {}, {}
    recipes = sorted({(task.trial, r["corpus"]) for task, r in results})
    for trial, corpus in recipes:
        own = [r for task, r in results if (task.trial, r["corpus"]) == (trial, corpus)]
        null = share(sum(r["null"] > 0 for r in own), len(own))
        rate = proportions([r["verdicts"] for r in own])
        hits: dict[float, list[int]] = defaultdict(lambda: [0, 0])
        for r in own:
            for s, k, n in r["hits"]:
                hits[s][0] += k
                hits[s][1] += n
        recall = {f"{s:.2f}": k / n for s, (k, n) in sorted(hits.items())}
        rows.append([trial, corpus, null.text, rate.text,
                     ", ".join(f"{s}: {v:.2f}" for s, v in recall.items())])  # fmt: skip
        name = f"{trial}, {corpus}"
        figures[name] = {"null": null._asdict(), "rate": rate._asdict(), "recall": recall}
        checks[f"{name}: shuffled runs with a discovery, consistent with 5 %"] = null.low <= 0.05
        checks[f"{name}: mean false-discovery proportion at most 5 %"] = within(rate)
    return Report("## One corpus only\n\n" + markdown(rows, left=2), figures, checks)


def naive(results: Results) -> Report:
    """What goes wrong without a second corpus."""
    own = [r for _, r in results]
    any_ = share(sum(r["found"] > 0 for r in own), len(own))
    found, width = mean([r["found"] for r in own]), mean([r["width"] for r in own])
    text = (
        f"## Cross-fitting with an analytic p-value, labels shuffled: {len(own)} runs\n\n"
        f"Runs with a false discovery: {any_.text}. Concepts found a run: {found.text}.\n"
        f"The null is {width.text} times as wide as the test assumes.\n"
    )
    figures = {"any": any_._asdict(), "found": found._asdict(), "width": width._asdict()}
    return Report(text, figures, {})


def ways(results: Results) -> Report:
    """Other ways to do step 2."""
    own = [r for _, r in results]
    singles = {
        name: (
            mean([r["singles"][name][0] for r in own]),
            mean([r["singles"][name][1] for r in own]),
        )
        for name in own[0]["singles"]
    }
    usual = "as it is"
    sets = {name: mean([r["sets"][name] for r in own]) for name in own[0]["sets"]}
    gaps = {name: mean([r["sets"][name] - r["sets"][usual] for r in own]) for name in sets}
    first = [["single latents ranked by", "AUROC, confirmation set", "right latent"]]
    first += [[name, a.text, f"{b.mean:.3f}"] for name, (a, b) in singles.items()]
    second = [["sets", "AUROC, confirmation set", "less the usual"]]
    second += [[name, value.text, gaps[name].text] for name, value in sets.items()]
    text = f"## Other ways to choose: {len(own)} worlds\n\n{markdown(first)}\n{markdown(second)}"
    figures = {
        "singles": {
            name: {"auroc": a._asdict(), "right": b.mean} for name, (a, b) in singles.items()
        },
        "sets": {name: value._asdict() for name, value in sets.items()},
    }
    return Report(text, figures, {})


USED = {  # the intervals that are printed; the others stand beside them
    "Student over topics, and one at chance", "Student over topics", "DeLong",
    "DeLong, no topics", "bootstrap over units",
}  # fmt: skip


def intervals(results: Results) -> Report:
    """Coverage of every interval that is printed, and of some that are not."""
    total: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(dict)
    for task, result in results:
        options = dict(task.options)
        where = {
            "flat": f"no topics, {options.get('positives')} texts",
            "topics": "12 topics",
            "difference": "a difference",
            "mean": "a mean over concepts",
        }[task.trial]
        for kind, (covered, n, width) in result.items():
            cell = total[where, kind].setdefault(options["auroc"], [0, 0, 0.0])
            cell[0] += covered
            cell[1] += n
            cell[2] += width * n
    aurocs = sorted({a for cells in total.values() for a in cells})
    rows = [["of", "interval", *(f"{a:.2f}" for a in aurocs)]]
    figures: dict[str, Any] = {}
    checks: dict[str, bool] = {}
    for (where, kind), cells in total.items():
        figures[f"{where}: {kind}"] = {
            str(a): {"coverage": c / n, "n": n, "width": w / n} for a, (c, n, w) in cells.items()
        }
        rows.append([where, kind, *(f"{cells[a][0] / cells[a][1]:.3f}" for a in aurocs)])
        if kind in USED:
            worst = min(share(int(c), int(n)).high for c, n, _ in cells.values())
            checks[f"intervals: {kind} ({where}) covers 93 % or more at every AUROC"] = (
                worst >= 0.93
            )
    text = "## Coverage of 95 % intervals, by true AUROC\n\n" + markdown(rows, left=2)
    return Report(text, figures, checks)


REPORTS: dict[str, Callable[[Results], Report]] = {
    "shuffled": shuffled,
    "half": half,
    "planted": planted,
    "few": few,
    "one-corpus": one_corpus,
    "naive": naive,
    "ways": ways,
    "intervals": intervals,
}
