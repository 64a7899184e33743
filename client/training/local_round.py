"""One round of local training, plain or with DP-SGD. Imported only after the policy said yes: it loads torch."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data.dataset import Dataset, open_dataset
from client.home import Home
from client.records.data_key import read_data_key
from client.settings import SiteConfig
from client.training.kept_state import LOST, KeptState, SiteState, keeps_state
from client.training.parallel import num_processes, run_in_processes
from client.training.progress import told
from shared.experiment.learning_rate import round_lr
from shared.messages.packing import MessageError, pack, unpack
from shared.messages.training import TrainRequest
from shared.seeding import Streams
from shared.training.engine import Engine, StepResult, run_training
from shared.training.optimizer import load_moments, make_optimizer, moments_of
from shared.training.processes import World
from shared.training.weights import empty_model
from shared.updates.int8_blocks import rounded_with_feedback

log = logging.getLogger("maskfed.client")
LARGEST = np.float32(3e38)
"""Of a change of a weight in a private round; finite in bfloat16, too."""


class Round:
    """A request made ready: everything that can be refused is refused here, before the ledger is charged."""

    def __init__(
        self,
        request: TrainRequest,
        base: NDArray[np.float32] | None,
        data: Dataset,
        home: Home,
        settings: SiteConfig,
        world: World | None = None,
    ) -> None:
        self.request, self.base, self.data, self.home, self.settings = request, base, data, home, settings
        self.world = world
        self.experiment = request.header.experiment
        self.is_private = self.experiment.privacy.mechanism != "none"
        self.device = world.device if world else choose_device(settings.device)
        if self.is_private and self.device.type == "cuda" and torch.cuda.device_count() > 1:
            log.info("a round with DP runs on one GPU: sampling, clipping and noise are one process's")
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.before = unpack(request.weights, request.header.manifest)
        frozen = {} if base is None else unpack(base, request.header.base_manifest)
        self.model = load_model(empty_model(self.experiment), self.before, frozen).to(self.device)
        federation = self.experiment.federation
        self.kept = KeptState(home, request.header, data) if keeps_state(federation) else None
        self.state = self.kept.find() if self.kept else None
        if self.state is None and self.kept and request.header.server_round > 1:
            log.info("the round starts afresh: this site has kept nothing of an earlier round of this run")
        self.units = data.units(self.experiment.privacy.unit) if self.is_private else []
        if self.is_private:
            from client.privacy.clipping import validate
            from client.privacy.grid_noise import clipping_bound

            validate(self.model)
            clipping_bound(self.experiment.privacy, sum(parameter.numel() for parameter in self._trainable()))

    def run(self) -> tuple[NDArray[np.float32], dict[str, float]]:
        """Train; return the packed update (weights after minus before) and the scalars that policy may release.

        The update is what the coordinator will have: of 8 bits it is already rounded.
        """
        processes = 1 if self.world else num_processes(self.request, self.device)
        if processes > 1:
            log.info("the round runs on %d GPUs", processes)
            return run_in_processes(
                train_share, (self.request, self.base, self.home, self.settings), self.home, processes
            )
        with self._progress() as self._tell:
            scalars = self._run_private() if self.is_private else self._run_plain()
        after = {name: tensor.detach().cpu().numpy() for name, tensor in self.model.named_parameters()}
        with np.errstate(over="ignore", invalid="ignore"):
            update = {name: after[name] - weights for name, weights in self.before.items()}
        if self.is_private:
            # Steps too long for float32 make weights infinite; what leaves is finite all the same.
            update = {name: np.nan_to_num(change, nan=0.0).clip(-LARGEST, LARGEST) for name, change in update.items()}
        packed, lost = self._sent(pack(update, self.request.header.manifest))
        self._keep(lost)
        return packed, scalars

    def _sent(self, update: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """What arrives of an update, and what is lost of it until the next one."""
        if self.experiment.federation.wire_dtype != "int8":
            return update, None
        return rounded_with_feedback(update, self.state.lost if self.state else None)

    def _run_private(self) -> dict[str, float]:
        from client.privacy.dp_sgd import train_private

        mu, anchor = self.experiment.federation.proximal_mu, [p.detach().clone() for p in self._trainable()]

        def pull_back() -> None:
            # The proximal term does not look at data, so it joins the gradient after the noise.
            for parameter, start in zip(self._trainable(), anchor, strict=True):
                assert parameter.grad is not None
                parameter.grad.add_(parameter.detach() - start, alpha=mu)

        self.optimizer = make_optimizer(self.model, self.experiment.optim)
        self._continue()
        train_private(
            self.model,
            self.experiment,
            self.data.images,
            self.units,
            device=self.device,
            precision=self.request.header.precision,
            optimizer=self.optimizer,
            lr=round_lr(self.experiment, self.request.header.server_round),
            after_noise=pull_back if mu else lambda: None,
            on_step=self._report,
        )
        return {}

    def _run_plain(self) -> dict[str, float]:
        header = self.request.header
        # The precision of the run, not what this machine would choose.
        train = self.experiment.train.model_copy(update={"precision": header.precision})
        engine = Engine(
            self.experiment.model_copy(update={"train": train}),
            self.model,
            streams(self.home, self.request.digest),
            self.world,
            trainable=[tensor.name for tensor in header.manifest.tensors],
            proximal_mu=self.experiment.federation.proximal_mu,
            lr=round_lr(self.experiment, header.server_round),
            is_averaged=False,
        )
        self.optimizer = engine.optimizer
        self._continue()
        losses: list[Tensor] = []
        norms: list[Tensor] = []

        def collect(step: int, result: StepResult) -> None:
            losses.append(result.loss_tensor)
            norms.append(result.grad_norm_tensor)
            self._report(step - 1)

        run_training(
            engine,
            self.data.images.select(self.data.train),
            steps=self.experiment.federation.local_steps,
            on_step=collect,
        )
        return {"loss": float(torch.stack(losses).mean()), "grad_norm": float(torch.stack(norms).mean())}

    def _continue(self) -> None:
        """Give the optimizer the moments of an earlier round, if any are kept."""
        if self.state is not None:
            steps, arrays = self.state
            load_moments(self.optimizer, self._named(), arrays, steps)
            # Moments are as large as two models.
            self.state = SiteState(steps, {name: array for name, array in arrays.items() if name == LOST})

    def _keep(self, lost: NDArray[np.float32] | None) -> None:
        if self.kept is None or not (self.world is None or self.world.is_main):
            return
        federation = self.experiment.federation
        steps = federation.local_steps + (self.state.steps if self.state else 0)
        arrays = moments_of(self.optimizer, self._named()) if federation.keep_moments else {}
        self.kept.keep(SiteState(steps, arrays if lost is None else {**arrays, LOST: lost}))

    def _named(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _progress(self) -> AbstractContextManager[Callable[[int], None]]:
        header = self.request.header
        if self.world and not self.world.is_main:
            return nullcontext(lambda _: None)
        return told(self.home, header.run, header.server_round, self.experiment.federation.local_steps)

    def _report(self, number: int) -> None:
        steps = self.experiment.federation.local_steps
        self._tell(number + 1)
        if (number + 1) % max(1, steps // 10) == 0:
            log.info("step %d of %d", number + 1, steps)

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def train_share(
    request: TrainRequest, base: NDArray[np.float32] | None, home: Home, settings: SiteConfig, world: World
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """What one of several processes does of a round."""
    return Round(request, base, open_dataset(home, settings.image_size), home, settings, world).run()


def load_model(
    model: nn.Module, trainable: dict[str, NDArray[np.float32]], frozen: dict[str, NDArray[np.float32]]
) -> nn.Module:
    """Fill a model with the tensors of a request; only those of `trainable` keep a gradient.

    Raises:
        MessageError: the request's tensors are not exactly the model's, by name and shape.
    """
    parameters = dict(model.named_parameters())
    given = {**frozen, **trainable}
    if set(given) != set(parameters) or len(given) != len(frozen) + len(trainable):
        raise MessageError("the request's tensors are not those of the experiment's model")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if given[name].shape != tuple(parameter.shape) or not np.isfinite(given[name]).all():
                raise MessageError(f"tensor {name} has another shape than the model's, or is not finite")
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(given[name])))
            parameter.requires_grad_(name in trainable)
    return model


def choose_device(wanted: str) -> torch.device:
    """The device of a round: a GPU where there is one, unless `site.toml` says otherwise."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def streams(home: Home, request_digest: str) -> Streams:
    """Random streams of a plain round: the same when the same request comes again, unknown without the site's key.

    Keyed by the digest, which covers run, round and weights: other weights under the same run and round never meet the
    same images, time steps and noise, so no two answers can be subtracted from each other.
    """
    return Streams(read_data_key(home), ("round", request_digest))
