from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli.main import app
from server.studies.stored_toys import read_toys
from shared.errors import InputError
from shared.experiment import recipes
from shared.experiment.config import load_experiment

SHIPPED = Path(__file__).parents[3] / "server" / "models"
PAPER = [
    # name, objective, steps, batch, size, schedule, learning rate, visible of all patches, channels
    ("celeba64-S-linear-msm-block50", "msm", 50_000, 256, "S", "linear", 2e-4, 128, 256, 3),
    ("celeba64-S-linear-dsm-finetune", "dsm", 150_000, 128, "S", "linear", 2e-4, 256, 256, 3),
    ("celeba64-S-linear-dsm-baseline", "dsm", 200_000, 128, "S", "linear", 2e-4, 256, 256, 3),
    ("celeba64-S-msm-block90", "msm", 200_000, 256, "S", "cosine", 2e-4, 32, 256, 3),
    ("celeba64-S-dsm-finetune", "dsm", 50_000, 64, "S", "cosine", 5e-5, 256, 256, 3),
    ("celeba64-S-dsm-baseline", "dsm", 200_000, 64, "S", "cosine", 5e-5, 256, 256, 3),
    ("celebahq256-S-msm-block90", "msm", 200_000, 256, "S", "cosine", 2e-4, 416, 4096, 3),
    ("celebahq256-S-dsm-finetune", "dsm", 50_000, 64, "S", "cosine", 5e-5, 4096, 4096, 3),
    ("celebahq256-S-dsm-baseline", "dsm", 200_000, 64, "S", "cosine", 5e-5, 4096, 4096, 3),
    ("celebahq256dwt-L-msm-block70", "msm", 200_000, 128, "L", "cosine", 1e-4, 320, 1024, 12),
    ("celebahq256dwt-L-dsm-finetune", "dsm", 550_000, 16, "L", "cosine", 5e-5, 1024, 1024, 12),
    ("celebahq256dwt-L-dsm-baseline", "dsm", 900_000, 16, "L", "cosine", 5e-5, 1024, 1024, 12),
    ("celebahq256dwt-B-msm-block70", "msm", 200_000, 256, "B", "cosine", 1e-4, 320, 1024, 12),
    ("celebahq256dwt-B-dsm-finetune", "dsm", 550_000, 32, "B", "cosine", 5e-5, 1024, 1024, 12),
    ("celebahq256dwt-B-dsm-baseline", "dsm", 900_000, 32, "B", "cosine", 5e-5, 1024, 1024, 12),
]


@pytest.mark.parametrize("expected", PAPER, ids=lambda row: row[0])
def test_paper_recipes_have_the_papers_hyper_parameters(expected):
    name, *values = expected
    e = load_experiment(recipes.find_experiment(name))
    found = [e.train.objective, e.train.steps, e.train.batch, e.model.size, e.diffusion.schedule, e.optim.lr]
    assert [*found, e.num_visible, e.grid_size**2, e.in_channels] == values
    assert e.diffusion.timesteps == 1000
    assert e.diffusion.prediction == "eps"
    assert e.optim.betas == (0.99, 0.99)
    assert (e.optim.weight_decay, e.optim.ema_decay) == (0.03, 0.999)
    assert (e.evaluation.sampler, e.evaluation.eta) == ("ddim", 1.0)


@pytest.mark.parametrize("name", [row[0] for row in PAPER])
def test_paper_recipes_are_the_authors_variants(name):
    e, is_dwt = load_experiment(recipes.find_experiment(name)), "dwt" in name
    assert (e.evaluation.clip_x_0, e.evaluation.rederive_eps, e.evaluation.ddim_grid) == (True, False, "truncated")
    assert (e.model.patch_init, e.optim.decay_all, e.optim.warmup_steps) == ("uniform", True, 0)
    assert (e.optim.ema_warmup, e.optim.ema_every) == ("power", 10 if is_dwt else 1)
    assert (e.model.qkv_bias, e.data.wavelet_tokens) == ((True, "split") if is_dwt else (False, "joint"))
    # Their configurations say `clip_grad: null` in the ablation and the transfer study's second stage.
    is_clipped = is_dwt or ("-msm-" in name and "linear" not in name)
    assert e.optim.grad_clip == (1.0 if is_clipped else 0.0)


@pytest.mark.parametrize("name", recipes.recipe_names())
def test_every_recipe_is_valid_and_says_what_it_is(name):
    experiment = load_experiment(recipes.find_experiment(name))
    # A recipe starts from nothing, or from a model that ships with the project.
    assert not experiment.train.init or (SHIPPED / experiment.train.init).is_dir()
    assert 10 < len(recipes.describe(name)) < 200


def test_stages_of_one_recipe_fit_together():
    for name, *_ in PAPER:
        stage, _, variant = name.partition("-msm-")
        if not variant:
            continue
        first, second = (load_experiment(recipes.find_experiment(n)) for n in (name, f"{stage}-dsm-finetune"))
        assert first.model == second.model
        assert first.diffusion == second.diffusion
        assert (first.data.wavelet, first.data.wavelet_tokens) == (second.data.wavelet, second.data.wavelet_tokens)


def test_a_name_and_a_path_are_both_found(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("")
    assert recipes.find_experiment(str(path)) == path
    assert recipes.find_experiment("celeba64-S-msm-block90").is_file()
    with pytest.raises(InputError, match=r"experiment 'none-such': .* experiments list"):
        recipes.find_experiment("none-such")


def test_experiments_list_prints_each_recipe_once():
    result = CliRunner().invoke(app, ["experiments", "list"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == recipes.recipe_names()


def test_experiments_show_prints_the_file_or_the_resolved_experiment():
    name = "celebahq256dwt-L-msm-block70"
    plain = CliRunner().invoke(app, ["experiments", "show", name]).output
    assert plain.strip() == (recipes.FOLDER / f"{name}.toml").read_text().strip()
    resolved = CliRunner().invoke(app, ["experiments", "show", name, "--resolved", "--set", "train.steps=7"]).output
    assert "steps = 7" in resolved
    assert "[federation]" in resolved


def test_toy_command_writes_figure_and_distances(tmp_path, monkeypatch):
    from server.studies import toys

    monkeypatch.setitem(toys.run_toy.__kwdefaults__, "num_samples", 20)
    asked = ["--seed", "5", "--operations", "8", "--operations", "4"]
    result = CliRunner().invoke(app, ["toy", "swiss-roll", "--out", str(tmp_path), *asked])
    assert result.exit_code == 0
    assert "median of 1 seeds" in result.output
    assert "4 steps' operations: masked stage alone" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["swiss-roll.json", "swiss-roll.png"]
    (stored,) = read_toys(tmp_path)
    assert [point.operations for point in stored.runs[0].points] == [4, 8]
    assert stored.command == "maskfed-server toy swiss-roll --seed=5 --operations=4 --operations=8"
