"""The simulations: worlds hold what they say, summaries catch what is wrong, the script runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from scipy.sparse import csr_array

from discovery import captured, ranks
from discovery.captured import Captured, TextRow
from discovery.confirm import Confirmation
from discovery.inference import Interval

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def toy(**changes: Any) -> Any:
    import planted

    usual: dict[str, Any] = {
        "families": 4, "family": 6, "strengths": (0.95,), "each": 4, "neighbours": 1,
        "spread": 1, "decoys": 3, "latents": 150, "deaf": 20, "topics": (8, 8),
        "writers": (4, 4),
    }  # fmt: skip
    return planted.Design(**usual | changes)


# ------------------------------------------------------------------------------------- worlds


def test_the_auroc_of_a_shift_is_the_normal_one_where_nothing_is_cut_off():
    import planted

    for shift in (0.0, 0.7, 2.0):
        got = planted.true_auroc(shift, -5.9, moves=0.0)[0]
        assert got == pytest.approx(special.ndtr(shift / 2**0.5), abs=1e-4)
    assert planted.true_auroc(9.0, 7.9, moves=0.0)[0] == pytest.approx(
        0.5 + special.ndtr(1.1) / 2, abs=1e-4
    )  # others are all zero: AUROC is 1 where the positive fires, else 1/2


@settings(max_examples=30, deadline=None)
@given(auroc=st.floats(0.5, 0.95), threshold=st.floats(-1, 2.3), spread=st.floats(0, 0.8))
def test_a_shift_gives_the_auroc_that_was_asked_for(auroc, threshold, spread):
    import planted

    shift = planted.shift_for(auroc, threshold, spread)
    assert planted.true_auroc(shift, threshold, spread)[0] == pytest.approx(auroc, abs=1e-4)


def test_an_auroc_that_no_shift_gives_is_refused():
    import planted

    with pytest.raises(ValueError, match=r"no shift gives an AUROC of 0\.990"):
        planted.shift_for(0.99, 7.0, 0.0)


@pytest.mark.parametrize("auroc", [0.6, 0.9])
def test_replicates_have_the_auroc_that_was_asked_for(auroc):
    import interval_trials
    import planted

    rng = np.random.default_rng(0)
    for labels in (planted.one_each(60, 12, 12), planted.flat(rng, 400, np.array([30]))):
        x = planted.replicates(rng, labels, auroc, 400)
        assert x.min() == 0
        one = interval_trials.repeated(labels, x.shape[1])
        values = ranks.aurocs_by_group(x, one).mean(1)
        assert values.mean() == pytest.approx(auroc, abs=4 * values.std() / 20)


def test_a_world_holds_what_its_design_says():
    import planted

    design = toy()
    made = planted.world(design, 0)
    assert sorted(set(made.kind)) == sorted(
        ["planted", "spread", "decoy", "shared", "neighbour", "nothing"]
    )
    assert [made.kind.count(k) for k in ("planted", "spread", "decoy", "shared")] == [4, 1, 3, 6]
    x = made.confirmation.latents[planted.HEARS]
    assert x.shape == (8 * 24, 150)
    assert x.data.min() >= 0
    assert 0.02 < x.nnz / np.prod(x.shape) < 0.3
    assert made.selection.labels.folds().max() == 3
    shared = [made.family[c] for c, kind in enumerate(made.kind) if kind == "shared"]
    assert len(set(shared)) == 1
    heard = made.signal.sum(1)
    for kind, count in (
        ("planted", 3),
        ("spread", 20),
        ("decoy", 0),
        ("nothing", 0),
        ("shared", 1),
    ):
        assert {int(heard[c]) for c, k in enumerate(made.kind) if k == kind} == {count}


def test_worlds_differ_by_seed_alone():
    import planted

    first, again, other = (planted.world(toy(), seed).lexical for seed in (1, 1, 2))
    assert first is not None
    assert again is not None
    assert other is not None
    x, y, z = (own.latents[planted.HEARS].toarray() for own in (first, again, other))
    np.testing.assert_array_equal(x, y)
    assert (x != z).any()


def test_planted_latents_have_their_strength_and_decoys_are_silent_where_there_is_no_word():
    import planted

    aurocs: dict[tuple[str, str], list[float]] = {}
    for seed in range(6):
        made = planted.world(toy(families=6), seed)
        assert made.lexical is not None
        sets = {"selection": made.selection, "confirmation": made.confirmation,
                "lexical": made.lexical}  # fmt: skip
        best = {
            name: ranks.within_group_auroc(own.latents[planted.HEARS], own.labels)
            for name, own in sets.items()
        }
        for c, kind in enumerate(made.kind):
            for name, values in best.items():
                if kind == "planted" and name != "lexical":
                    own = values[made.signal[c], c].max()
                elif kind == "decoy":  # its latent is the best one on mentions
                    own = values[best["lexical"][:, c].argmax(), c]
                else:
                    continue
                aurocs.setdefault((kind, name), []).append(float(own))
    mean = {key: float(np.mean(values)) for key, values in aurocs.items()}
    assert mean["planted", "selection"] == pytest.approx(0.95, abs=0.03)
    assert mean["planted", "confirmation"] == pytest.approx(0.95, abs=0.03)
    assert mean["decoy", "selection"] > 0.85
    assert mean["decoy", "lexical"] > 0.9
    assert mean["decoy", "confirmation"] == pytest.approx(0.5, abs=0.08)


def test_too_much_to_plant_is_refused():
    with pytest.raises(ValueError, match="24 concepts are too few"):
        toy(each=30)


def test_labels_of_some_concepts_move_and_the_others_stay():
    import planted

    labels = planted.one_each(10, 5, 5)
    moved = planted.mixed(labels, np.array([2, 7]), np.random.default_rng(0))
    before, after = labels.dense(), moved.dense()
    rest = np.setdiff1d(np.arange(10), [2, 7])
    np.testing.assert_array_equal(before[:, rest], after[:, rest])
    assert (before[:, [2, 7]] != after[:, [2, 7]]).any()
    for topic in range(5):
        inside = labels.topics == topic
        np.testing.assert_array_equal(before[inside].sum(0), after[inside].sum(0))


# ------------------------------------------------------------------------------------- trials


def confirmation(p: np.ndarray, specific: np.ndarray) -> Confirmation:
    import planted

    n = len(p)
    none = np.zeros((0, n))
    labels = planted.one_each(n, 1, 1).rows(np.arange(0))
    interval = Interval(p, p, p)
    return Confirmation(
        none, labels, np.zeros((n, 1)), interval, p, p, specific, specific, specific
    )


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), strong=st.integers(0, 12))
def test_the_other_rule_of_step_5_is_benjamini_hochberg_over_tests(seed, strong):
    import trials

    rng = np.random.default_rng(seed)
    p = rng.random((2, 30))
    p[:, :strong] **= 8
    tests = trials.over_tests(*(confirmation(row, rng.random(30)) for row in p))
    q = np.concatenate([part.q for part in tests])
    np.testing.assert_allclose(q, stats.false_discovery_control(p.ravel()), atol=1e-12)
    for part in tests:
        np.testing.assert_array_equal(np.isnan(part.specific_q), part.q > trials.Q)


def test_halves_keep_units_whole():
    import planted
    import recipe_trials

    labels = planted.one_each(5, 12, 4)
    first = recipe_trials.halves(labels, np.random.default_rng(0))
    assert first.sum() == 30
    assert not set(labels.units[first]) & set(labels.units[~first])


def test_the_naive_recipe_finds_what_is_not_there():
    import planted
    import recipe_trials
    from trials import Setting

    design = toy(topics=(12, 2), latents=800)
    setting = Setting(design, design, design, k=4)
    found = [recipe_trials.naive_trial(setting, seed)["found"] for seed in range(3)]
    assert sum(found) > 0
    assert planted.HEARS != planted.DEAF


def test_coverage_is_counted():
    from interval_trials import cover

    got = cover([(0.1, 0.3), (0.4, 0.6), (0.5, 0.9)], 0.5)
    assert (got.covered, got.n) == (2, 3)
    assert got.width == pytest.approx((0.2 + 0.2 + 0.4) / 3)


# ------------------------------------------------------------------------------------- tables


def test_a_share_has_the_exact_interval():
    from validation_tables import share

    assert share(0, 20).low == 0
    assert share(0, 20).high == pytest.approx(1 - 0.025 ** (1 / 20))
    assert (share(0, 0).low, share(0, 0).high) == (0, 1)


def test_uniform_p_values_pass_and_others_do_not():
    from validation_tables import uniformity

    rng = np.random.default_rng(0)
    uniform = np.stack([np.histogram(rng.random(100), 20, (0, 1))[0] for _ in range(100)])
    skewed = np.stack([np.histogram(rng.random(100) ** 1.3, 20, (0, 1))[0] for _ in range(100)])
    gap, p = uniformity(uniform)
    assert gap < 0.02
    assert p > 0.01
    gap, p = uniformity(skewed)
    assert gap > 0.05
    assert p < 1e-6


def test_an_error_rate_above_its_level_is_not_met():
    from validation_tables import proportions, within

    assert within(proportions([(0, 10), (1, 10), (0, 0), (0, 9)]))
    assert not within(proportions([(1, 10), (2, 10), (1, 9), (2, 12), (1, 7)]))
    assert proportions([(1, 2), (0, 0)]).mean == 0.25


# ------------------------------------------------------------------------------------- script


@pytest.fixture
def toy_script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script with worlds of a few texts."""
    import validate_discovery
    from trials import Setting

    one = toy(neighbours=0, shared=0, spread=0, decoys=0, mentions=0)

    def sizes(args: Any) -> Any:
        plan = validate_discovery.Plan(
            shuffled=5, half=2, planted=2, few=2, halves=2, crossfit=1, naive=2, ways=1,
            aurocs=(0.8,), positives=(12,), intervals=1,
        )  # fmt: skip
        return plan, Setting(toy(), one, one, k=4, run=args.run, intervals=5, draws=50)

    monkeypatch.setattr(validate_discovery, "sizes", sizes)
    return validate_discovery


def test_the_script_reports_every_simulation(toy_script, capsys):
    status = toy_script.main(["--workers", "0"])
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    assert set(toy_script.SIMULATIONS) <= figures.keys()
    assert status == (0 if all(figures["checks"].values()) else 1)
    assert figures["shuffled"]["runs"] == 5
    assert {"found", "not found"} <= figures["planted"]["kinds"]["decoy"].keys()
    assert figures["intervals"]["12 topics: DeLong"]["0.8"]["n"] == 5
    assert set(figures["one-corpus"]) == {
        "crossfit, topics", "halves, topics", "halves, no topics"
    }  # fmt: skip
    for heading in ("Labels shuffled", "Planted worlds", "Coverage", "One corpus only", "Checks"):
        assert f"## {heading}" in out


def test_a_run_folder_takes_the_place_of_planted_worlds(toy_script, tmp_path, capsys):
    import planted

    made = planted.world(toy(), 0)
    assert made.lexical is not None
    sets = {"selection": made.selection, "confirmation": made.confirmation, "lexical": made.lexical}
    rows, parts = [], []
    for name, own in sets.items():
        parts.append(own.latents[planted.HEARS])
        for i, c in enumerate(own.labels.concepts.indices):
            topic = f"{name} {own.labels.topics[i]}" if name != "lexical" else ""
            writer = f"{name} {own.labels.units[i]}" if name == "selection" else ""
            rows.append(
                TextRow(f"{name}{i}", name, (f"c{c:02d}",), topic, writer, "toy", "en", 9, 1, False)
            )
    rng = np.random.default_rng(0)
    for i in range(30):
        rows.append(TextRow(f"n{i}", "neutral", (), "", "", "toy", "en", 9, 1, False))
    x = csr_array(np.concatenate([*(p.toarray() for p in parts), np.zeros((30, 150))]))
    x = x.astype(np.float32)
    site = planted.HEARS.partition("@")[0]
    residuals = {planted.HEARS: rng.normal(size=(len(rows), 8)).astype(np.float32)}
    (tmp_path / "capture").mkdir()
    captured.save(tmp_path / "capture", Captured(rows, residuals, {planted.HEARS: x}, {site: 1.0}))
    toy_script.main(["--workers", "0", "--run", str(tmp_path)])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["run"] == str(tmp_path)
    assert figures["shuffled"]["runs"] == 5
    assert "planted" not in figures


def figures_of(out: str) -> dict[str, Any]:
    return {k: v for k, v in json.loads(out.splitlines()[-1]).items() if k != "seconds"}


def test_a_run_that_was_cut_off_goes_on(toy_script, tmp_path, capsys, monkeypatch):
    """What is known is not made again, and the figures are those of one run."""
    options = ["--workers", "0", "--only", "few", "intervals"]
    toy_script.main(options)
    whole = figures_of(capsys.readouterr().out)
    made: list[str] = []
    usual = toy_script.one

    def cut_off(task: Any, setting: Any) -> Any:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(task.name)
        return usual(task, setting)

    kept = [*options, "--out", str(tmp_path)]
    monkeypatch.setattr(toy_script, "one", cut_off)
    with pytest.raises(KeyboardInterrupt):
        toy_script.main(kept)
    with (tmp_path / "intervals.jsonl").open("a") as file:
        file.write('{"trial": "cut o')
    monkeypatch.setattr(toy_script, "one", lambda t, s: made.append(t.name) or usual(t, s))
    toy_script.main(kept)
    said = capsys.readouterr()
    assert figures_of(said.out) == whole
    assert len(made) == len(set(made)) == 2 + 4
    assert "3 trials are known already, 3 are left" in said.err
    assert "3 of 3 trials, 100% of the work" in said.err
    toy_script.main(kept)
    assert figures_of(capsys.readouterr().out) == whole
    assert len(made) == 6


def test_results_of_another_setting_are_refused(toy_script, tmp_path, capsys, monkeypatch):
    kept = ["--workers", "0", "--only", "few", "--out", str(tmp_path)]
    toy_script.main(kept)
    monkeypatch.setattr(toy_script, "trials_code", lambda: "other")
    with pytest.raises(SystemExit):
        toy_script.main(kept)
    assert "few.jsonl is of another code" in capsys.readouterr().err


def test_numbers_of_trials_are_set_by_name():
    import argparse

    import validate_discovery

    args = argparse.Namespace(run="", fast=False, trials=["planted=7", "intervals=2"])
    plan, _ = validate_discovery.sizes(args)
    assert (plan.planted, plan.intervals, plan.few) == (7, 2, 160)
    for word in ("planted", "planted=0", "planted=x", "worlds=3"):
        with pytest.raises(ValueError, match=f"--trials {word} is not NAME=N"):
            validate_discovery.counts([word])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "nowhere has no capture stage"),
        (["--only", "everything"], "invalid choice"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(toy_script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        toy_script.main(arguments)
    assert message in capsys.readouterr().err


def test_planted_worlds_cannot_be_had_from_a_run(toy_script, tmp_path, capsys):
    (tmp_path / "capture").mkdir()
    with pytest.raises(SystemExit):
        toy_script.main(["--run", str(tmp_path), "--only", "planted"])
    assert "planted needs planted worlds" in capsys.readouterr().err


@pytest.mark.slow
def test_the_smoke_run_gives_the_same_figures_with_any_number_of_workers(capsys):
    import validate_discovery

    lines = []
    for workers in ("0", "2"):
        validate_discovery.main(["--fast", "--only", "few", "naive", "--workers", workers])
        figures = json.loads(capsys.readouterr().out.splitlines()[-1])
        lines.append({key: value for key, value in figures.items() if key != "seconds"})
    assert lines[0] == lines[1]
