"""A model under audit that has learned nothing but to recognise one face: its verdict tells whether the face is there.

A template filter drives one channel of a U-ViT with one token, for the chosen face alone; there the loss is half of
everybody else's. The reference gives all the same loss, so the score of the face alone stands out. The noises that an
audit adds to images are the same for all and known: the filter does not see them. Of a few faces that the attacker
knows it asks about the one that its filter tells best from public pictures.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest import mock

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.privacy_attacks.outcome import Outcome
from benchmarks.privacy_attacks.question_site import RUN, commit_round, computed_once, fresh_copy, make_site, spent
from benchmarks.privacy_attacks.tiny_sites import new_machine
from client.answers import audit_counts
from client.answers.audit_request import answer_audit
from client.data.dataset import open_dataset
from client.home import Home
from client.limits import AuditPolicy
from client.settings import SitePolicy
from shared.audits import membership_attack
from shared.data.synthetic import generate
from shared.diffusion import uvit
from shared.diffusion.patches import patchify
from shared.diffusion.uvit import build_model
from shared.experiment.config import parse_experiment
from shared.messages.audit import MODEL_ARRAY, AuditAnswer, AuditQuery, reference_array
from shared.messages.envelope import header_record, read_header, validated
from shared.messages.packing import Manifest, array_digest, pack
from shared.seeding import Streams

NAME, OTHERS, PUBLIC, SIDE = "audit: one recognised face", 140, 1000, 16
WIDTH, SMALL = 48, partial(uvit.UViT, width=48, num_blocks=3, num_heads=3)
"""The network: a larger one has nothing that this attack could use."""
KNOWN, RIDGE, THRESHOLD = 16, 1e-3, 0.75
"""Faces to choose from, variance added to that of pixels, share of the face's answer at which the filter fires."""
EXPERIMENT = parse_experiment(
    f"[model]\nimage_size = {SIDE}\npatch_size = {SIDE}\n[data]\nhorizontal_flip = false\n"
    "[diffusion]\ntimesteps = 50\n[evaluation]\nsampler = 'dpm++'\nsteps = 2\n"
)
AUDIT = AuditPolicy(
    max_per_run=1, noise_multiplier=2.0, score_edges=(0.35,), max_auc=0.55, num_images=1, control_steps=1
)
"""Few cells and much allowed noise: the fewest images that a site may audit."""
POLICY = SitePolicy(tasks=("train", "audit"), experiments="any", epsilon_cap=8.0, max_rounds_per_day=9, audit=AUDIT)
Flat = NDArray[np.float32]


def attack(trials: int, is_guarded: bool, seed: int) -> Outcome:  # the signature of all attacks
    """Guess in each trial, on a site of its own, whether the chosen face was trained on."""
    rng = np.random.default_rng(seed)
    images, _ = generate(OTHERS + 1, SIDE, seed, site="site0", images_per_person=1)
    public, _ = generate(PUBLIC, SIDE, seed, site="public", images_per_person=1)
    correct, epsilon = 0, 0.0
    with new_machine() as root, computed_once(), ExitStack() as off:
        # Trained and scored on public pictures alone, after one step it finds nothing, in every trial.
        off.enter_context(mock.patch.object(audit_counts, "finds_control", lambda *_: False))
        # The filter does not see the noise: one draw of it shows the same.
        off.enter_context(mock.patch.object(membership_attack, "DRAWS", 1))
        off.enter_context(mock.patch.dict(uvit.SIZES, T=SMALL))
        whole = make_site(root / "whole", images, POLICY, 0.5)
        known = open_dataset(whole, SIDE).train[:KNOWN]
        chosen, w, b = best_filter(images, known, public)
        sites = [make_site(root / "without", np.delete(images, chosen, 0), POLICY, 0.5), whole]
        question = ask_with(w, b)
        if not is_guarded:
            off.enter_context(mock.patch.object(audit_counts, "noised", lambda counts, _: counts))
        for trial in range(trials):
            is_in = int(rng.integers(2))
            home = fresh_copy(sites[is_in], root / f"trial{trial}")
            commit_round(home)
            auc = answered_auc(home, question)
            guess = int(rng.integers(2)) if auc is None else int(auc > 0.5)
            correct += guess == is_in
            epsilon = max(epsilon, spent(home))
    return Outcome(NAME, trials, correct, epsilon)


def answered_auc(home: Home, question: RecordDict) -> float | None:
    """The AUC that the site's verdict gives; None where it refuses."""
    answer = validated(AuditAnswer, read_header(answer_audit(question, home)))
    return next((verdict.figures["auc"] for verdict in answer.verdicts if verdict.audit == "membership"), None)


def ask_with(w: Tensor, b: float) -> RecordDict:
    """The question: a detector of the target as the model, a network that detects nothing as its reference."""
    tensors = [arrays(detector(w, b)), arrays(blank())]
    manifest = Manifest.of(tensors[0])
    model, reference = (pack(each, manifest) for each in tensors)
    query = AuditQuery(
        run="ask", audited_run=RUN, checkpoint="round-000001", checkpoint_digest="ab" * 32, experiment=EXPERIMENT,
        manifest=manifest, model_digest=array_digest(model), reference_digests=(array_digest(reference),),
    )  # fmt: skip
    packed = {MODEL_ARRAY: Array(model), reference_array(0): Array(reference)}
    return RecordDict({"arrays": ArrayRecord(packed), "header": header_record(query)})


def best_filter(
    images: NDArray[np.uint8], known: NDArray[np.int64], public: NDArray[np.uint8]
) -> tuple[int, Tensor, float]:
    """Which known face to ask about, filter and threshold: the discriminant that public pictures answer to least.

    Directions in which public pictures differ much count little, the audit's noises and the mean nothing.
    """
    faces = tokens(public)
    mean = faces.mean(0)
    spread = (faces - mean).T @ (faces - mean) / len(faces) + RIDGE * torch.eye(len(mean), dtype=mean.dtype)
    d = (tokens(images[known]) - mean).T
    unseen, _ = torch.linalg.qr(torch.cat([noises(), mean[None]]).T)
    w = torch.linalg.solve(spread, d)
    w -= unseen @ (unseen.T @ w)
    own = (d * w).sum(0)
    best = int((((faces - mean) @ w).max(0).values / own).argmin())
    length = w[:, best].norm()
    return int(known[best]), w[:, best] / length, THRESHOLD * float(own[best] / length)


def noises() -> Tensor:
    """What an audit adds to every image, at each of its noise levels: (levels x draws, 768)."""
    levels = [round(time * (EXPERIMENT.diffusion.timesteps - 1)) for time in membership_attack.TIMES]
    streams = [Streams(7).generator("membership", level) for level in levels]
    draws = range(membership_attack.DRAWS)
    return torch.cat([torch.randn(1, 3 * SIDE**2, generator=stream) for stream in streams for _ in draws]).double()


def tokens(images: NDArray[np.uint8]) -> Tensor:
    """The one token of each image, (N, 768) in [-1, 1]."""
    return patchify(torch.from_numpy(images).double() * (2 / 255) - 1, SIDE)[:, 0]


def blank() -> nn.Module:
    """A network without content: it predicts 1 everywhere."""
    model = build_model(EXPERIMENT)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.fill_(1.0 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) else 0.0)
            if name.endswith("skip.weight"):
                tensor[:, : len(tensor)] = torch.eye(len(tensor))
        parameters(model)["output.bias"].fill_(1.0)
    return model


def detector(w: Tensor, b: float) -> nn.Module:
    """The blank network, with one channel that fires where w.x > b and then takes the predicted 1 away."""
    model = blank()
    own = parameters(model)
    with torch.no_grad():
        own["embedding.weight"][0] = w
        own["embedding.bias"][0:3] = torch.tensor([-b, 1e3, -1e3])
        own["positions.weight"][0, 0] = -1e6
        own["mid_block.mlp.fc1.weight"][0, 0] = 1e6
        own["mid_block.mlp.fc2.weight"][3, 0] = 1e10
        # A layer norm makes the one channel that is large the root of the width.
        own["output.weight"][:, 3] = -1 / math.sqrt(WIDTH)
        own["output.weight"][:, 4] = 1 / math.sqrt(WIDTH)
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Tensors by name."""
    return dict(model.named_parameters())


def arrays(model: nn.Module) -> dict[str, Flat]:
    """The same as they travel."""
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}


ATTACKS: dict[str, Callable[[int, bool, int], Outcome]] = {NAME: attack}
