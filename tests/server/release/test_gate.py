import json

import numpy as np
import pytest

from server.release.gate import gather, release
from server.release.verdict_files import add_verdicts
from server.runs.lineage import MeanImageCharge, as_provenance, charges_of_weights
from server.runs.run_directory import create
from shared.errors import InputError
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import load_group, load_meta, save_checkpoint
from shared.storage.runlog import RunLog

WEIGHTS, OTHER_WEIGHTS = ({"a": np.arange(3, dtype=np.float32) + shift} for shift in (0, 1))


def finish(path, *, privacy="none", groups=("ema",), sites=("north", "south"), settings=(), **spent):
    """A run of one round; returns it and the digest of its checkpoint."""
    exact = ("release.audits=['membership', 'memorisation']",)
    run = create(path, parse_experiment("", [f"privacy.mechanism={privacy}", *exact, *settings]))
    log = RunLog(run.metrics)
    answered = [{"site": site} for site in sites]
    if privacy != "none":
        answered[0] |= {"epsilon": 3.25, "delta": 1e-5, "epsilon_cap": 8.0, "unit": "person"} | spent
    if sites:
        log.write("round", round=1, asked=answered, answered=answered, lost=[{"site": "gone"}])
    place = {"round": 1} if sites else {"step": 9}
    save_checkpoint(run.round_checkpoint(1), dict.fromkeys(groups, WEIGHTS), {"experiment": run.experiment, **place})
    return run, load_meta(run.round_checkpoint(1)).digest


def measure(run, digest, *, weights="ema", weights_sha256="", **reference):
    folder = run.evaluation("round-000001")
    folder.mkdir(parents=True)
    result = {
        "metrics": {"fd_random_inception_192": 4.5},
        "intervals": {"fd_random_inception_192": [4.0, 5.0]},
        "reference": {"name": "/home/somebody/held-out", "n": 500.0, "release": "own"} | reference,
        "checkpoint": {"round": 1, "step": None, "digest": digest, "weights_sha256": weights_sha256},
        "num_images": 1000,
        "weights": weights,
        "sampler": "ddim",
        "nfe": 250,
    }
    (folder / "result.json").write_text(json.dumps(result))


def verdict(site, audit, digest, *, passed=True, figures=None):
    facts = {"site": site, "audit": audit, "checkpoint": "round-000001", "checkpoint_digest": digest}
    return {**facts, "passed": passed, "reason": "" if passed else "copies", "figures": figures or {}, "schema": 1}


def audited(run, digest, **changes):
    for site in ("north", "south"):
        for audit in ("membership", "memorisation"):
            folder = run.path / "audits"
            folder.mkdir(exist_ok=True)
            content = verdict(site, audit, digest, **(changes if (site, audit) == ("south", "memorisation") else {}))
            (folder / f"{site}-{audit}.json").write_text(json.dumps(content))


def test_a_model_with_all_evidence_is_released_with_its_card(tmp_path):
    run, digest = finish(tmp_path / "run", privacy="dp-sgd")
    measure(run, digest)
    audited(run, digest)
    out = release(run.path, tmp_path / "out")
    assert {path.name for path in out.iterdir()} == {"ema.safetensors", "meta.json", "experiment.toml", "MODEL_CARD.md"}
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    assert (load_group(out, "ema")["a"] == WEIGHTS["a"]).all()
    assert load_meta(out).parents == (digest,)
    card = (out / "MODEL_CARD.md").read_text()
    for text in (
        "at 2 sites: site 1, site 2.",
        "| fd_random_inception_192 | 4.5 | 4 to 5 | 1000 | held-out | 500 | ema | ddim, 250 evaluations |",
        "over 1 round of",
        "| site 1 | 3.25 | 1e-05 | 8 | person |",
    ):
        assert text in card
    assert (
        "| site 2 | not released |" in card and "override" not in card and "Intended use" in card and "Licence" in card
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_training_without_dp_is_unbounded_in_the_card(tmp_path):
    run, digest = finish(tmp_path / "run")
    measure(run, digest)
    audited(run, digest)
    card = (release(run.path, tmp_path / "out") / "MODEL_CARD.md").read_text()
    assert "| site 1 | unbounded |" in card


def test_epsilon_of_the_dp_part_stands_beside_unbounded_in_the_card(tmp_path):
    run, digest = finish(tmp_path / "run", privacy="dp-sgd", epsilon="unbounded", dp_epsilon=3.25)
    measure(run, digest)
    audited(run, digest)
    card = (release(run.path, tmp_path / "out") / "MODEL_CARD.md").read_text()
    assert "| site 1 | unbounded (DP part 3.25) | 1e-05 | 8 | person |" in card


def test_the_card_says_what_aligned_images_cost_the_sites(tmp_path):
    charge = MeanImageCharge(run="a", num_sites=4, unit="person", noise_multiplier=3.5, delta=1e-5, epsilon=1.13)
    for sites, said in (("north", "south"), "| site 1 | unbounded |"), ((), "No federated training."):
        run, _ = finish(tmp_path / f"run-{len(sites)}", sites=sites)
        meta = load_meta(run.round_checkpoint(1))
        place = {"experiment": meta.experiment, "round": meta.round, "step": meta.step}
        digest = save_checkpoint(
            run.round_checkpoint(1), {"ema": WEIGHTS}, place | {"provenance": as_provenance([charge])}
        ).digest
        measure(run, digest)
        out = release(run.path, tmp_path / f"out-{len(sites)}", override="for this test")
        card = (out / "MODEL_CARD.md").read_text()
        assert "of each of 4 sites" in card and "noise multiplier 3.5, unit person, epsilon 1.13 at delta 1e-05" in card
        assert said in card and "no ledger" not in card
        assert charges_of_weights(load_meta(out).provenance) == (charge,)


def test_without_a_distance_nothing_is_released(tmp_path):
    run, digest = finish(tmp_path / "run")
    audited(run, digest)
    with pytest.raises(InputError, match="no distance of round-000001 was measured"):
        release(run.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_audit_must_have_passed_at_every_site_that_took_part(tmp_path):
    run, digest = finish(tmp_path / "run")
    measure(run, digest)
    assert len(gather(run.round_checkpoint(1)).problems) == 4
    audited(run, digest, passed=False)
    with pytest.raises(InputError, match="memorisation audit of south failed: copies"):
        release(run.path, tmp_path / "out")


def test_figures_beyond_the_experiments_limits_stop_a_release(tmp_path):
    run, digest = finish(tmp_path / "run", settings=["release.max_copy_rate=0.02"])
    measure(run, digest)
    audited(run, digest, figures={"copy_rate": 0.03, "num_images": 1000})
    with pytest.raises(InputError, match=r"copy_rate 0.03 is above the limit 0.02"):
        release(run.path, tmp_path / "out")


def test_canaries_are_the_evidence_of_a_plan_with_dp_unless_the_experiment_asks_for_more(tmp_path):
    run, digest = finish(tmp_path / "run", privacy="dp-sgd", settings=["release.audits=auto"])
    measure(run, digest)
    with pytest.raises(InputError, match=r"canaries audit of north is missing: ask with `maskfed-server audit --can"):
        release(run.path, tmp_path / "out")
    (run.path / "audits").mkdir()
    for site in ("north", "south"):
        content = verdict(site, "canaries", digest, figures={"epsilon_at_least": 1.5, "epsilon": 3.25})
        (run.path / "audits" / f"{site}.json").write_text(json.dumps(content))
    card = (release(run.path, tmp_path / "out") / "MODEL_CARD.md").read_text()
    assert "| site 1 | canaries | pass | epsilon_at_least 1.5, epsilon 3.25 |" in card
    plain, _ = finish(tmp_path / "plain", settings=["release.audits=auto"])
    assert {line.split()[0] for line in gather(plain.round_checkpoint(1)).problems[1:]} == {
        "membership",
        "memorisation",
    }


def test_the_experiment_says_which_audits_are_needed(tmp_path):
    run, digest = finish(tmp_path / "run", settings=["release.audits=[]"])
    measure(run, digest)
    assert release(run.path, tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("figures", "limit"),
    [({"auc": 0.61}, "auc"), ({"tpr_at_1_percent_fpr": 0.06}, "tpr"), ({"copied": 0.051}, "copied")],
)
def test_default_limits_are_those_of_the_design(tmp_path, figures, limit):
    run, digest = finish(tmp_path / "run")
    measure(run, digest)
    audited(run, digest, figures=figures)
    with pytest.raises(InputError, match=limit):
        release(run.path, tmp_path / "out")


def test_verdicts_of_another_checkpoint_do_not_count(tmp_path):
    run, digest = finish(tmp_path / "run")
    measure(run, digest)
    audited(run, "0" * 64)
    assert len(gather(run.round_checkpoint(1)).problems) == 4


def test_central_training_needs_one_audit_of_each_kind(tmp_path):
    run, digest = finish(tmp_path / "run", sites=())
    measure(run, digest)
    with pytest.raises(InputError, match="audit of the training data is missing"):
        release(run.path, tmp_path / "out")
    audited(run, digest)
    assert "Trained centrally, 9 steps" in (release(run.path, tmp_path / "out") / "MODEL_CARD.md").read_text()


def test_an_override_is_recorded(tmp_path):
    run, _ = finish(tmp_path / "run")
    out = release(run.path, tmp_path / "out", override="for the reviewers")
    card = (out / "MODEL_CARD.md").read_text()
    assert "Released by override" in card and "for the reviewers" in card and "audit of site 1 is missing" in card
    assert load_meta(out).provenance["release"]["override"] == "for the reviewers"
    assert str(tmp_path) not in card


def test_raw_weights_are_not_released(tmp_path):
    run, _ = finish(tmp_path / "run", groups=("model",))
    with pytest.raises(InputError, match="no EMA weights"):
        release(run.path, tmp_path / "out", override="please")


def test_nothing_is_overwritten(tmp_path):
    run, _ = finish(tmp_path / "run")
    with pytest.raises(InputError, match="not an empty folder"):
        release(run.path, run.path, override="x")


def test_a_checkpoint_outside_a_run_has_no_evidence(tmp_path):
    save_checkpoint(tmp_path / "model", {"ema": WEIGHTS}, {"experiment": parse_experiment(""), "step": 1})
    with pytest.raises(InputError, match="lies in no run"):
        release(tmp_path / "model", tmp_path / "out")


def test_verdict_files_of_sites_are_taken_into_the_run(tmp_path):
    run, digest = finish(tmp_path / "run")
    file = tmp_path / "verdict.json"
    file.write_text(json.dumps(verdict("north", "membership", digest)))
    (kept,) = add_verdicts(run.path, [file])
    assert kept.parent == run.path / "audits"
    assert [each["site"] for each in gather(run.round_checkpoint(1)).audits] == ["north"]
    elsewhere = {**verdict("north", "membership", digest), "checkpoint_digest": "../" * 20 + "abcd"}
    strangers = [json.dumps(each) for each in (verdict("../../x", "membership", digest), elsewhere)]
    for content in ("nonsense", "{}", *strangers):
        file.write_text(content)
        with pytest.raises(InputError, match="not an audit verdict"):
            add_verdicts(run.path, [file])


def second_round(run, weights=OTHER_WEIGHTS, *, weights_changed=True, **spent):
    log = RunLog(run.metrics)
    answered = [{"site": "north", "epsilon": 5.5, "delta": 1e-5, "epsilon_cap": 8.0, "unit": "person"} | spent]
    log.write("round", round=2, asked=answered, answered=answered, weights_changed=weights_changed)
    save_checkpoint(run.round_checkpoint(2), {"ema": weights}, {"experiment": run.experiment, "round": 2})
    return load_meta(run.round_checkpoint(2)).digest


def test_a_distance_of_another_checkpoint_opens_no_release(tmp_path):
    run, first = finish(tmp_path / "run", privacy="dp-sgd")
    second = second_round(run)
    measure(run, first)
    audited(run, second)
    with pytest.raises(InputError, match="no distance of round-000002 was measured"):
        release(run.round_checkpoint(2), tmp_path / "out")


def test_the_card_has_the_epsilon_of_the_round_that_is_released(tmp_path):
    run, _ = finish(tmp_path / "run", privacy="dp-sgd")
    second_round(run)
    for number, value in ((1, "3.25"), (2, "5.5")):
        evidence = gather(run.round_checkpoint(number))
        assert {each["site"]: each["epsilon"] for each in evidence.epsilons}["north"] == value


@pytest.mark.parametrize("override", ["", "  ", "\n\t"])
def test_a_blank_reason_overrides_nothing(tmp_path, override):
    run, _ = finish(tmp_path / "run")
    with pytest.raises(InputError, match="--override REASON records why"):
        release(run.path, tmp_path / "out", override=override)


def test_names_of_sites_are_in_a_release_only_when_they_are_asked_for(tmp_path):
    run, digest = finish(tmp_path / "run", sites=("north", "north-2"))
    measure(run, digest, release="exact", sites="north+north-2", name="/x/pooled.safetensors")
    (run.path / "audits").mkdir()
    content = verdict("north-2", "membership", digest, passed=False) | {"reason": "north-2 found copies"}
    (run.path / "audits" / "a.json").write_text(json.dumps(content))
    hidden = release(run.path, tmp_path / "hidden", override="x")
    text = "".join((hidden / name).read_text() for name in ("MODEL_CARD.md", "meta.json", "experiment.toml"))
    assert "north" not in text and "site 2 found copies" in text and "statistics of 2 sites" in text
    named = (release(run.path, tmp_path / "named", override="x", name_sites=True) / "MODEL_CARD.md").read_text()
    assert "at 2 sites: north, north-2." in named and "statistics of north, north-2" in named


def test_the_card_counts_rounds_that_changed_the_weights(tmp_path):
    run, _ = finish(tmp_path / "run")
    second_round(run, WEIGHTS, weights_changed=False)
    card = (release(run.path, tmp_path / "out", override="x") / "MODEL_CARD.md").read_text()
    assert "Fine-tuned over 1 round of" in card and "1 more round did not change the weights" in card


def test_weights_of_an_earlier_round_need_no_second_distance(tmp_path):
    run, first = finish(tmp_path / "run")
    second_round(run, WEIGHTS, weights_changed=False)
    measure(run, first, weights_sha256=load_meta(run.round_checkpoint(1)).sha256["ema.safetensors"])
    assert not any("distance" in problem for problem in gather(run.round_checkpoint(2)).problems)


def test_a_distance_of_the_raw_weights_opens_no_release_of_the_average(tmp_path):
    run, digest = finish(tmp_path / "run", groups=("ema", "model"))
    measure(run, digest, weights="model")
    assert gather(run.round_checkpoint(1)).problems[0].startswith("no distance of round-000001")


def test_a_site_that_answered_only_in_a_round_without_change_is_not_in_the_weights(tmp_path):
    run, _ = finish(tmp_path / "run", sites=("north",))
    RunLog(run.metrics).write("round", round=2, answered=[{"site": "west"}], weights_changed=False)
    save_checkpoint(run.round_checkpoint(2), {"ema": WEIGHTS}, {"experiment": run.experiment, "round": 2})
    assert gather(run.round_checkpoint(2)).sites == ["north"]


def test_constants_of_dp_and_the_source_of_the_start_stand_in_the_card(tmp_path):
    settings = ["privacy.noise_multiplier=1.3", "privacy.max_grad_norm=0.7", "privacy.sample_rate=0.02"]
    settings += ["federation.central_noise_multiplier=0.9", "federation.max_update_norm=3.5"]
    settings += ["federation.update_norm_action=clip", "federation.sites_per_round=2"]
    run, _ = finish(tmp_path / "run", privacy="dp-sgd", settings=settings)
    start = parse_experiment("", ["train.objective=msm", "train.batch=32", "mask.kind=block", "mask.ratio=0.9"])
    facts = {"data": "/home/somebody/celeba", "num_images": 600}
    saved = save_checkpoint(
        tmp_path / "start", {"ema": WEIGHTS}, {"experiment": start, "step": 4000, "provenance": facts}
    )
    run.settings.write_text(json.dumps({"init": str(tmp_path / "start")}))
    folder, meta = run.round_checkpoint(1), {"experiment": run.experiment, "round": 1, "parents": (saved.digest,)}
    save_checkpoint(folder, {"ema": WEIGHTS}, meta)
    card = (release(run.path, tmp_path / "out", override="x") / "MODEL_CARD.md").read_text()
    assert "noise multiplier 1.3, gradients of a unit clipped to 0.7, sampling rate 0.02" in card
    assert "Client-level DP at the coordinator: noise multiplier 0.9, updates clipped to 3.5" in card
    assert f"objective msm on 600 public images (celeba), 4,000 steps of 32 images, checkpoint `{saved.digest}`" in card
    assert "/home/" not in card
    # Another checkpoint lies there now: its facts are not those of the start.
    save_checkpoint(tmp_path / "start", {"ema": OTHER_WEIGHTS}, {"experiment": start, "step": 9, "provenance": facts})
    card = (release(run.path, tmp_path / "replaced", override="x") / "MODEL_CARD.md").read_text()
    assert f"- Started from: checkpoint `{saved.digest}`." in card
    (tmp_path / "start" / "meta.json").unlink()
    card = (release(run.path, tmp_path / "later", override="x") / "MODEL_CARD.md").read_text()
    assert f"- Started from: checkpoint `{saved.digest}`." in card


@pytest.mark.parametrize("passed", [None, 0, ""])
def test_only_an_audit_that_says_it_passed_has_passed(tmp_path, passed):
    run, digest = finish(tmp_path / "run")
    measure(run, digest)
    audited(run, digest, passed=passed)
    with pytest.raises(InputError, match="memorisation audit of south failed"):
        release(run.path, tmp_path / "out")


@pytest.mark.parametrize("value", ["0.9", float("nan"), None])
def test_a_figure_that_is_no_number_passes_no_limit(tmp_path, value):
    run, digest = finish(tmp_path / "run")
    measure(run, digest)
    audited(run, digest, figures={"auc": value})
    with pytest.raises(InputError, match=r"auc .* is above the limit"):
        release(run.path, tmp_path / "out")


def test_a_release_may_lie_in_folders_that_are_not_there_yet(tmp_path):
    run, _ = finish(tmp_path / "run")
    assert release(run.path, tmp_path / "new" / "deep" / "out", override="x").is_dir()
