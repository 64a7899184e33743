"""How large a run of the benchmark is: images, network, rounds; and the images themselves, by site."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from shared.data.image_cache import open_images
from shared.data.image_set import ImageCache
from shared.diffusion import uvit
from shared.experiment.config import Experiment
from shared.seeding import derive_seed

NUM_SITES = 9
REFERENCE_SHARE = 0.1
"""Of the private persons: no site gets them, the report's losses are theirs."""


@dataclass(frozen=True)
class Scale:
    """One size of the whole benchmark.

    Attributes:
        name: `small` or `full`.
        image_size: side in pixels.
        local_steps: of each site and round.
        batch: images of a local step.
        public_steps: of the public training before the rounds.
        public_batch: images of a step of it.
        site_images: of each site where the faces are synthetic.
        init: model that ships with the project and starts the public training; empty: fresh weights.
        rounds: of an arm.
        honest_rounds: of the honest arms with the check; together more than a hundred.
    """

    name: str
    image_size: int
    local_steps: int
    batch: int
    public_steps: int
    public_batch: int
    site_images: int
    init: str
    rounds: int
    honest_rounds: int

    def experiment(self, seed: int, **federation: object) -> Experiment:
        """The rounds; everything else is as in the recipe `demo-faces32-T`."""
        return Experiment.model_validate(
            {
                "train": {"batch": self.batch, "seed": seed, "precision": "float32", "compile": "never"},
                "model": {"size": "T", "image_size": self.image_size, "patch_size": 4},
                "diffusion": {"schedule": "cosine", "prediction": "v"},
                "optim": {"lr": 3e-4, "ema_decay": 0.995},
                "federation": {"local_steps": self.local_steps, "min_replies": 1, **federation},
            }
        )

    def install(self) -> None:
        """Make the network of this scale that of size T, in this process."""
        if self.name == "small":
            uvit.SIZES["T"] = partial(uvit.UViT, width=64, num_blocks=3, num_heads=2)


SCALES = {
    "small": Scale("small", 16, 5, 8, 1500, 32, 240, "", 10, 35),
    "full": Scale("full", 32, 10, 8, 400, 32, 480, "synthetic32-T-msm", 20, 35),
}


@dataclass(frozen=True)
class Pictures:
    """The images of one seed."""

    sites: tuple[ImageCache, ...]
    public: ImageCache
    """Half of it trains the start, the other half is what the check looks at."""
    report: ImageCache
    """Private persons that no site has."""

    @property
    def training(self) -> ImageCache:
        """What the start is trained on."""
        return self.public.select(range(0, len(self.public), 2))

    @property
    def held_out(self) -> ImageCache:
        """What the check looks at."""
        return self.public.select(range(1, len(self.public), 2))


def pictures(scale: Scale, private: str, public: str, seed: int) -> Pictures:
    """Private images by person among nine sites, and public ones; synthetic where no set is named."""
    size, count = scale.image_size, scale.site_images
    shown = open_images(public or f"synthetic:public:4000:{seed}", size)
    if not private:
        sites = tuple(open_images(f"synthetic:site{k}:{count}:{seed}", size) for k in range(NUM_SITES))
        return Pictures(sites, shown, open_images(f"synthetic:heldout9:512:{seed}", size))
    everybody = open_images(private, size)
    assert everybody.persons is not None, f"{private} has no folders by person"
    persons = sorted(set(everybody.persons.tolist()), key=lambda person: derive_seed(seed, "divide", person))
    num_report = round(REFERENCE_SHARE * len(persons))
    place = {person: number % NUM_SITES for number, person in enumerate(persons[num_report:])}
    places = np.array([place.get(person, -1) for person in everybody.persons.tolist()])
    sites = tuple(everybody.select(np.flatnonzero(places == number)) for number in range(NUM_SITES))
    return Pictures(sites, shown, everybody.select(np.flatnonzero(places == -1)))


def quiet_threads() -> None:
    """One thread: arms run side by side."""
    torch.set_num_threads(1)
