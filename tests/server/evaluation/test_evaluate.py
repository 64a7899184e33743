import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from server.cli import main as cli
from server.evaluation.drawing import Drawing
from server.evaluation.evaluate import evaluate, evaluate_run, evaluate_samples
from server.evaluation.reference import open_reference
from server.evaluation.sample import SampleOptions, sample
from server.evaluation.yardstick import Options
from server.runs.run_directory import create
from shared.data.synthetic import generate
from shared.diffusion.uvit import build_model
from shared.errors import InputError
from shared.evaluation.feature_statistics import accumulate, load_statistics, save_statistics, statistics_of
from shared.evaluation.frechet import frechet_distance
from shared.evaluation.generate import load_model, sample_images
from shared.evaluation.networks import load_extractor
from shared.evaluation.private_statistics import make_projection, private_statistics, save_projection, simulated
from shared.experiment.config import parse_experiment
from shared.storage.checkpoint import save_checkpoint
from shared.storage.chunks import Rank
from shared.storage.runlog import read_metrics
from shared.storage.synthetic_mark import SyntheticMark, read_mark

REFERENCE = "synthetic:heldout:40"
TOML = """
[model]
image_size = 16
patch_size = 8
[evaluation]
steps = 2
num_images = 24
batch = 12
extractor = "random-inception"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.storage.chunks.CHUNK_ITEMS", 10)
    # How good intervals are is shown by `test_scores.py` and `test_frechet.py`.
    monkeypatch.setattr("shared.evaluation.frechet.JACKKNIFE_GROUPS", 4)
    monkeypatch.setattr("server.evaluation.measures.scores.KID_SUBSETS", 5)
    experiment = parse_experiment(TOML)
    run = create(tmp_path / "run", experiment)
    for place in (0, 1):
        torch.manual_seed(place)
        tensors = {name: tensor.numpy() for name, tensor in build_model(experiment).state_dict().items()}
        save_checkpoint(run.round_checkpoint(place), {"ema": tensors}, {"experiment": experiment, "round": place})
    return run


def read(file):
    return json.loads(file.read_text())


def distance(result):
    return result["metrics"]["fd_random_inception_192"]


def test_result_holds_the_distance_of_the_samples_and_where_it_comes_from(run):
    file = evaluate(run.round_checkpoint(1), Options(reference=REFERENCE))
    result = read(file)
    loaded, extractor = load_model(run.round_checkpoint(1)), load_extractor("random-inception")
    samples = extractor(sample_images(loaded.model, loaded.experiment, range(24), 24))
    reference = open_reference(REFERENCE, 16, extractor, run.path / "again")
    expected = frechet_distance(statistics_of(samples, extractor.space), reference.statistics)
    assert distance(result) == pytest.approx(expected, rel=1e-4)
    assert result["reference"] | {"sha256": ""} == {
        "name": REFERENCE, "n": 40.0, "sha256": "", "release": "own", "epsilon": None, "delta": None, "sites": "",
        "unreadable": 0, "ignored": {},
    }  # fmt: skip
    assert result["checkpoint"]["digest"] == loaded.meta.digest and result["weights"] == "ema"
    for key in (
        "num_images",
        "sampler",
        "steps",
        "eta",
        "nfe",
        "seed",
        "wall_seconds",
        "versions",
        "command",
        "extractor",
    ):
        assert key in result
    assert not (file.parent / "parts").exists()


def test_run_log_gets_a_line_and_the_run_a_grid_of_the_same_seeds(run):
    evaluate(run.round_checkpoint(0), Options(reference=REFERENCE, name="round-000000"))
    (line,) = [event for event in read_metrics(run.metrics) if event["kind"] == "evaluation"]
    assert line["round"] == 0 and line["name"] == "round-000000" and "fd_random_inception_192" in line["metrics"]
    loaded = load_model(run.round_checkpoint(0))
    images = sample_images(loaded.model, loaded.experiment, range(10), 12)
    grid = np.asarray(Image.open(run.samples / "round-000000.png"))
    assert read_mark(run.samples / "round-000000.png") == SyntheticMark(loaded.meta.digest, "0 to 9")
    assert np.abs(grid[:16, :16].astype(int) - images[0].permute(1, 2, 0).numpy()).max() <= 1


def test_batch_size_does_not_change_the_distance(run):
    found = [
        distance(read(evaluate(run.path, Options(reference=REFERENCE, drawing=Drawing(batch=batch), name=f"b{batch}"))))
        for batch in (1, 7, 24)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_two_ranks_give_the_result_of_one(run, monkeypatch):
    alone = read(evaluate(run.path, Options(reference=REFERENCE, name="alone")))
    for rank in (Rank(1, 2), Rank(0, 2)):
        monkeypatch.setattr("server.evaluation.evaluate.rank_from_environment", lambda rank=rank: rank)
        file = evaluate(run.path, Options(reference=REFERENCE, name="shared"))
    assert distance(read(file)) == pytest.approx(distance(alone), rel=1e-4)


def test_interrupted_evaluation_goes_on_where_it_was(run, monkeypatch):
    calls = []

    def fail_later(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample_images(*arguments, **options)

    monkeypatch.setattr("server.evaluation.drawing.sample_images", fail_later)
    with pytest.raises(KeyboardInterrupt):
        evaluate(run.path, Options(reference=REFERENCE))
    result = read(evaluate(run.path, Options(reference=REFERENCE)))
    assert calls == [10, 10, 10, 4] and result["sampled_now"] == 14
    monkeypatch.undo()
    assert distance(result) == pytest.approx(
        distance(read(evaluate(run.path, Options(reference=REFERENCE, name="x")))), rel=1e-4
    )


def test_reference_statistics_are_computed_once_and_can_be_given_as_a_file(run, monkeypatch):
    first = read(evaluate(run.path, Options(reference=REFERENCE, name="first")))
    (kept,) = (run.path / "evaluation" / "references").glob("*.safetensors")
    monkeypatch.setattr("server.evaluation.reference._compute", None)
    assert distance(read(evaluate(run.path, Options(reference=REFERENCE, name="second")))) == distance(first)
    by_file = read(evaluate(run.path, Options(reference=str(kept), name="third")))
    assert distance(by_file) == distance(first) and set(by_file["metrics"]) == {"fd_random_inception_192"}


def test_statistics_of_another_extractor_are_refused_with_both_digests(run, tmp_path):
    extractor = load_extractor("random-inception")
    other = statistics_of(np.eye(192), extractor.space.__class__("inception-v3-compat", "192", "cd" * 32))
    save_statistics(other, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=f"{extractor.space.sha256[:16]}.*{'cd' * 8}"):
        evaluate(run.path, Options(reference=str(tmp_path / "other.safetensors")))


def test_every_checkpoint_of_a_run_makes_a_curve(run):
    files = evaluate_run(run.path, Options(reference=REFERENCE))
    assert [read(file)["checkpoint"]["round"] for file in files] == [0, 1]
    assert distance(read(files[0])) != distance(read(files[1]))
    with pytest.raises(InputError, match="no checkpoint"):
        evaluate_run(run.path / "evaluation", Options(reference=REFERENCE))


def test_a_reference_with_images_of_the_same_model_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFED_CACHE", str(tmp_path / "cache"))
    folder = sample(run.path, SampleOptions(num_images=12, out=tmp_path / "generated"))
    with pytest.raises(InputError, match="images that this checkpoint generates"):
        evaluate(run.path, Options(reference=str(folder)))


def test_samples_are_the_same_as_grid_array_and_folder(run, tmp_path):
    images = np.load(sample(run.path, SampleOptions(12, tmp_path / "images.npy", seed=3)))
    folder = sample(run.path, SampleOptions(12, tmp_path / "folder", seed=3, drawing=Drawing(batch=5)))
    grid = np.asarray(Image.open(sample(run.path, SampleOptions(12, tmp_path / "grid.png", seed=3, columns=4))))
    assert images.shape == (12, 3, 16, 16) and images.dtype == np.uint8
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == "00000003.png" and len(names) == 12
    files = np.stack([np.asarray(Image.open(folder / name)).transpose(2, 0, 1) for name in names])
    assert np.abs(files.astype(int) - images).max() <= 1
    assert (grid[:16, :16] == images[0].transpose(1, 2, 0)).all() and grid.shape[:2] == (52, 70)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "folder",
        "grid.png",
        "images.npy",
        "images.npy.json",
        "run",
    ]


def test_every_way_of_sampling_says_what_the_images_are(run, tmp_path):
    model = load_model(run.latest).meta.digest
    for name, seeds in (("images.npy", "3 to 5"), ("grid.png", "3 to 5")):
        assert read_mark(sample(run.path, SampleOptions(3, tmp_path / name, seed=3))) == SyntheticMark(model, seeds)
    folder = sample(run.path, SampleOptions(2, tmp_path / "folder", seed=3))
    assert [read_mark(folder / f"{seed:08d}.png") for seed in (3, 4)] == [
        SyntheticMark(model, "3"),
        SyntheticMark(model, "4"),
    ]


def test_a_folder_with_content_is_not_overwritten(run, tmp_path):
    with pytest.raises(InputError, match="not an empty folder"):
        sample(run.path, SampleOptions(2, run.path))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["evaluate", "RUN", "--reference", "nowhere"], "does not exist"),
        (["evaluate", "RUN", "--reference", REFERENCE, "--num", "1"], "at least 2"),
        (["evaluate", "RUN", "--reference", REFERENCE, "--raw"], "no raw weights"),
        (["evaluate", "RUN", "--reference", REFERENCE, "--extractor", "magic"], "unknown"),
        (["evaluate", "RUN", "--reference", REFERENCE, "--precision", "int8"], "float32 or bfloat16"),
        (["evaluate", "nowhere", "--reference", REFERENCE], "neither a checkpoint"),
        (["sample", "RUN", "--set", "evaluation.steps=0"], "evaluation.steps"),
        (["sample", "RUN", "--num", "9999"], "at most 4096"),
        (["report", "nowhere"], "no experiment.toml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, line, monkeypatch, capsys):
    filled = [str(run.path) if argument == "RUN" else argument for argument in arguments]
    monkeypatch.setattr("sys.argv", ["maskfed-server", *filled])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    error = capsys.readouterr().err
    assert caught.value.code == 2 and line in error and error.count("error:") == 1


def test_command_prints_the_distance(run):
    shown = CliRunner().invoke(cli.app, ["evaluate", str(run.path), "--reference", REFERENCE, "--num", "12"])
    assert shown.exit_code == 0, shown.output
    assert "fd_random_inception_192" in shown.output and "12 images of round-000001 (ema weights)" in shown.output


def test_statistics_file_says_what_it_was_made_of(run):
    evaluate(run.path, Options(reference=REFERENCE))
    (kept,) = (run.path / "evaluation" / "references").glob("*.safetensors")
    statistics = load_statistics(Path(kept))
    assert statistics.source == REFERENCE and statistics.images["size"] == "16" and statistics.n == 40


def test_sum_of_the_sites_statistics_is_a_reference(run, tmp_path):
    extractor = load_extractor("random-inception")
    images = torch.from_numpy(generate(60, 16, 0, site="heldout")[0])
    whole = accumulate(extractor.batches(images.split(20)), extractor.space)
    names = []
    for number, part in enumerate(images.split([10, 50])):
        names.append(str(tmp_path / f"site{number}.safetensors"))
        statistics = accumulate(extractor.batches([part]), extractor.space)
        save_statistics(replace(statistics, site=f"site{number}", release="exact"), Path(names[-1]))
    save_statistics(whole, tmp_path / "whole.safetensors")
    pooled = read(evaluate(run.path, Options(reference=",".join(names), name="pooled")))
    central = read(evaluate(run.path, Options(reference=str(tmp_path / "whole.safetensors"), name="central")))
    assert distance(pooled) == pytest.approx(distance(central), rel=1e-9)
    assert pooled["reference"]["n"] == 60 and pooled["reference"]["release"] == "exact"
    assert pooled["reference"]["sites"] == "site0+site1"
    with pytest.raises(InputError, match="twice"):
        evaluate(run.path, Options(reference=f"{names[0]},{names[0]}", name="twice"))


def test_private_reference_tells_bias_and_resolution(run, tmp_path):
    extractor = load_extractor("random-inception")
    images = torch.from_numpy(generate(80, 16, 0, site="heldout")[0])
    projection = make_projection(extractor(images), extractor.space, 8)
    save_projection(projection, tmp_path / "projection.safetensors")
    noisy = private_statistics(projection, extractor(images), 0.5, simulated(np.random.default_rng(0)))
    save_statistics(noisy, tmp_path / "noisy.safetensors")
    reference = str(tmp_path / "noisy.safetensors")
    options = Options(reference=reference, projection=tmp_path / "projection.safetensors", name="dp")
    result = read(evaluate(run.path, options))
    assert set(result["metrics"]) == {"fd_random_inception_192_pca8"}
    assert set(result["noise"]) == {"bias", "resolution", "is_resolved"} and result["reference"]["release"] == "dp"
    with pytest.raises(InputError, match="do not compare"):
        evaluate(run.path, Options(reference=reference, name="without"))
    with pytest.raises(InputError, match="goes with private statistics"):
        evaluate(run.path, Options(reference=REFERENCE, projection=options.projection, name="images"))


def test_federated_reference_asks_the_sites_once_for_all_checkpoints(run, tmp_path, monkeypatch):
    extractor = load_extractor("random-inception")
    images = torch.from_numpy(generate(40, 16, 0, site="heldout")[0])
    statistics = accumulate(extractor.batches([images]), extractor.space)
    pooled, asked, said = tmp_path / "pooled.safetensors", [], []

    def ask_sites(home, experiment, question, say):
        asked.append((home, experiment, question.query.kind, question.query.space))
        save_statistics(replace(statistics, site="site0+site1", release="exact"), pooled)
        return pooled

    monkeypatch.setattr("server.evaluation.evaluate.ask_sites", ask_sites)
    options = Options(reference="federated", home=tmp_path, say=said.append)
    results = [read(file) for file in evaluate_run(run.path, options)]
    assert asked == [(tmp_path, run.experiment, "exact", extractor.space)]
    assert [result["reference"]["sites"] for result in results] == ["site0+site1"] * 2
    assert said == [f"kept for later evaluations: --reference {pooled}"]
    assert distance(results[1]) == distance(read(evaluate(run.path, Options(reference=str(pooled), name="again"))))


def test_private_statistics_are_asked_of_sites_only(run, tmp_path):
    with pytest.raises(InputError, match="--reference federated"):
        evaluate(run.path, Options(reference=REFERENCE, release="dp"))
    with pytest.raises(InputError, match="go together"):
        evaluate(run.path, Options(reference="federated", release="dp", home=tmp_path))
    with pytest.raises(InputError, match="give --home"):
        evaluate(run.path, Options(reference="federated"))


def test_a_reference_of_one_image_is_refused_before_anything_is_sampled(run, tmp_path):
    extractor = load_extractor("random-inception")
    one = accumulate(extractor.batches([torch.zeros(1, 3, 16, 16, dtype=torch.uint8)]), extractor.space)
    save_statistics(one, tmp_path / "one.safetensors")
    for reference in (str(tmp_path / "one.safetensors"), "synthetic:heldout:1"):
        with pytest.raises(InputError, match="1 image, a distance needs at least 2"):
            evaluate(run.path, Options(reference=reference, name="one"))
        assert not (run.evaluation("one") / "parts").exists()


def stored(images, where):
    """The same images as a folder, a zip, or an array in one of the layouts of the field."""
    if where.suffix in (".npy", ".npz"):
        last = images.transpose(0, 2, 3, 1)
        np.save(where, images) if where.suffix == ".npy" else np.savez(where, last)
        return where
    folder = where.with_suffix("")
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{number:03d}.png")
    return Path(shutil.make_archive(str(folder), "zip", folder)) if where.suffix == ".zip" else folder


@pytest.mark.parametrize("name", ["folder", "pictures.zip", "first.npy", "last.npz"])
def test_images_of_any_model_are_measured_without_a_checkpoint(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKFED_CACHE", str(tmp_path / "cache"))
    images, extractor = generate(20, 16, 3, site="public")[0], load_extractor("random-inception")
    path = stored(images, tmp_path / name)
    result = read(evaluate_samples(str(path), Options(reference=REFERENCE, extractor="random-inception")))
    reference = open_reference(REFERENCE, 16, extractor, tmp_path / "again")
    ours = statistics_of(extractor(torch.from_numpy(images)), extractor.space)
    assert distance(result) == pytest.approx(frechet_distance(ours, reference.statistics), rel=1e-4)
    low, high = result["intervals"]["fd_random_inception_192"]
    assert low < distance(result) < high and result["num_images"] == 20 and result["reference"]["n"] == 40
    pixels = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images)
    assert result["samples"] == {
        "name": str(path), "sha256": hashlib.sha256(pixels).hexdigest(), "size": 16, "unreadable": 0, "ignored": {},
    }  # fmt: skip
    assert result["extractor"]["sha256"] == extractor.space.sha256 and "checkpoint" not in result


@pytest.mark.parametrize(
    ("make", "size", "line"),
    [
        (lambda path: path / "none", 0, "does not exist"),
        (lambda path: stored(np.zeros((3, 3, 16, 12), np.uint8), path / "flat"), 0, "'000.png' 12 x 16.*give --size"),
        (lambda path: stored(np.zeros((3, 3, 16, 12), np.uint8), path / "flat.npy"), 0, "16 x 12 pixels"),
        (lambda path: stored(np.zeros((3, 3, 16, 16), np.uint8), path / "a.npy"), 32, "32 x 32 are compared"),
        (lambda path: stored(np.zeros((1, 3, 16, 16), np.uint8), path / "one.npy"), 0, "1 image, a distance needs"),
        (lambda _: "synthetic:public:9", 0, "give --size"),
        (lambda path: moments(path / "stats.npz"), 0, "mu and sigma, no images: give them to --reference"),
    ],
)
def test_samples_that_cannot_be_measured_are_one_line_and_leave_nothing(tmp_path, monkeypatch, make, size, line):
    monkeypatch.setenv("MASKFED_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    with pytest.raises(InputError, match=line) as caught:
        evaluate_samples(str(path), Options(reference=REFERENCE, extractor="random-inception"), size)
    assert "\n" not in str(caught.value) and not (tmp_path / "evaluation").exists()


def moments(path):
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    return path


def test_samples_of_other_sizes_are_brought_to_the_size_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFED_CACHE", str(tmp_path / "cache"))
    path = stored(generate(5, 24, 3)[0][:, :, :20], tmp_path / "wide")
    options = Options(reference=REFERENCE, extractor="random-inception", out=tmp_path / "out")
    assert read(evaluate_samples(str(path), options, 16))["samples"]["size"] == 16


def test_samples_that_the_reference_holds_are_refused(tmp_path, monkeypatch):
    images = generate(12, 16, 3)[0]
    for name, chosen in (("samples.npy", images[:6]), ("reference.npy", images[4:])):
        np.save(tmp_path / name, chosen)
    options = Options(str(tmp_path / "reference.npy"), extractor="random-inception", out=tmp_path / "out")
    with pytest.raises(InputError, match="holds 2 images that are among the samples"):
        evaluate_samples(str(tmp_path / "samples.npy"), options)
    assert not (tmp_path / "out").exists(), "nothing half-made stays"


def test_a_checkpoint_or_samples_and_only_what_goes_with_them(run, tmp_path, monkeypatch, capsys):
    np.save(tmp_path / "a.npy", np.zeros((4, 3, 16, 16), np.uint8))
    given = ["evaluate", "--reference", REFERENCE, "--extractor", "random-inception", "--out", str(tmp_path / "out")]
    for words, line in (
        ([], "give a checkpoint or --samples PATH"),
        ([str(run.path), "--samples", "x"], "not both"),
        (["--samples", "x", "--num", "5"], "--num goes with a checkpoint"),
        (["--samples", "x", "--all"], "--all goes with a checkpoint"),
        ([str(run.path), "--size", "16"], "--size goes with --samples"),
        (["--samples", "x", "--reference", "federated"], "name the pooled file"),
    ):
        monkeypatch.setattr("sys.argv", ["maskfed-server", *given, *words])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        error = capsys.readouterr().err
        assert caught.value.code == 2 and line in error and error.count("\n") == 1
    shown = CliRunner().invoke(cli.app, [*given, "--samples", str(tmp_path / "a.npy")])
    assert shown.exit_code == 0, shown.output
    assert f"4 images of {tmp_path / 'a.npy'} against 40 of {REFERENCE}" in shown.output


def test_another_evaluation_never_replaces_a_result(run, tmp_path):
    file = evaluate(run.path, Options(reference=REFERENCE, name="one"))
    before = file.read_bytes()
    for options, line in (
        (Options(reference="synthetic:heldout:30", name="one"), "reference is .*give another --name or --out"),
        (Options(reference=REFERENCE, name="one", num_images=12), "number of images is 24, not 12"),
        (
            Options(reference=REFERENCE, name="one", drawing=Drawing(overrides=("evaluation.seed=9",))),
            "seed is 0, not 9",
        ),
    ):
        with pytest.raises(InputError, match=line):
            evaluate(run.path, options)
    with pytest.raises(InputError, match="model is"):
        evaluate(run.round_checkpoint(0), Options(reference=REFERENCE, name="one"))
    assert file.read_bytes() == before and sorted(path.name for path in file.parent.iterdir()) == ["result.json"]
    assert evaluate(run.path, Options(reference=REFERENCE, name="one")) == file
    file.write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        evaluate(run.path, Options(reference=REFERENCE, name="one"))


def test_everything_that_changes_a_figure_gets_a_folder_of_its_own(run):
    asked = [Options(reference=REFERENCE), Options(reference="synthetic:heldout:30"), Options(REFERENCE, num_images=12)]
    assert len({evaluate(run.path, options).parent for options in [*asked, asked[0]]}) == 3


def test_a_folder_of_somebody_else_is_no_place_for_an_evaluation(run, tmp_path):
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "parts" / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match="holds other files"):
        evaluate(run.path, Options(reference=REFERENCE, out=tmp_path / "mine"))
    with pytest.raises(InputError, match="holds other files"):
        evaluate(run.path, Options(reference=REFERENCE, out=run.path))
    assert (tmp_path / "mine" / "parts" / "thesis.tex").read_text() == "years"


def test_a_damaged_kept_reference_is_computed_again(run):
    first = read(evaluate(run.path, Options(reference=REFERENCE, name="first")))
    for file in (run.path / "evaluation" / "references").iterdir():
        file.write_bytes(file.read_bytes()[:40])
    assert distance(read(evaluate(run.path, Options(reference=REFERENCE, name="second")))) == distance(first)


def test_what_was_left_out_of_samples_and_reference_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("MASKFED_CACHE", str(tmp_path / "cache"))
    samples = stored(generate(4, 16, 3)[0], tmp_path / "samples")
    reference = stored(generate(5, 16, 4)[0], tmp_path / "reference")
    (samples / "notes.txt").write_text("x")
    (reference / "photo.xyz").write_text("x")
    given = ["evaluate", "--samples", str(samples), "--reference", str(reference), "--out", str(tmp_path / "out")]
    shown = CliRunner().invoke(cli.app, [*given, "--extractor", "random-inception"])
    assert f"4 images of {samples} (1 .txt ignored) against 5 of {reference} (1 .xyz ignored)" in shown.output
    result = read(tmp_path / "out" / "result.json")
    assert result["samples"]["ignored"] == {".txt": 1} and result["reference"]["ignored"] == {".xyz": 1}
