"""The public start of the rounds: trained once a seed, kept beside the arms."""

from pathlib import Path

from benchmarks.poison.scale import Pictures, Scale
from server.federation.starting_point import find_init, initial_model
from server.federation.updates.global_model import GlobalModel
from shared.seeding import Streams
from shared.storage.checkpoint import load_group, save_checkpoint
from shared.storage.files import locked
from shared.training.engine import Engine, run_training
from shared.training.weights import load_weights, new_model


def start_of(scale: Scale, images: Pictures, seed: int, out: Path) -> GlobalModel:
    """The global model of round 0: the moving average after `public_steps` on the public images."""
    folder = out / f"start-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    experiment = scale.experiment(seed)
    with locked(out / f"start-{seed}.lock"):
        if not folder.exists():
            _train(scale, images, seed, folder)
    return initial_model(folder, experiment)


def _train(scale: Scale, images: Pictures, seed: int, folder: Path) -> None:
    experiment = scale.experiment(seed)
    train = experiment.train.model_copy(update={"batch": scale.public_batch})
    optim = experiment.optim.model_copy(update={"lr": 1e-3, "warmup_steps": 50, "ema_decay": 0.99})
    model = new_model(experiment, Streams(seed))
    if scale.init:
        load_weights(model, load_group(find_init(scale.init), "ema"))
        optim = optim.model_copy(update={"lr": 3e-4})
    engine = Engine(experiment.model_copy(update={"train": train, "optim": optim}), model, Streams(seed, ("start",)))
    run_training(engine, images.training, steps=scale.public_steps)
    groups = engine.groups()
    save_checkpoint(
        folder, {"model": groups["ema"], "ema": groups["ema"]}, {"experiment": experiment, "step": scale.public_steps}
    )
