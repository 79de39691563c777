"""What `fetch-teacher` can get: where the files lie, what they hash to, and which network they hold.

Needs no torch, so that a plan can be made before anything is fetched.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

from bdense_core.errors import BadValue
from bdense_core.network_config import NetworkConfig

__all__ = ["BASE_URL", "CATALOGUE", "INCEPTION", "Entry", "Role", "Source", "entry"]

Role = Literal["features", "teacher", "reference"]

BASE_URL = "https://nvlabs-fi-cdn.nvidia.com"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One published file.

    Attributes:
        path: below the server's address.
        sha256: None where it is not known in advance.
        size: bytes, where known.
    """

    path: str
    sha256: str | None = None
    size: int | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def url(self, base_url: str | None = None) -> str:
        """Its address on the publisher's server, or on a mirror of it."""
        return f"{(base_url or BASE_URL).rstrip('/')}/{self.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A teacher with the statistics it is judged by.

    Attributes:
        reference_images: how many images the reference statistics were made of.
        features: the network behind these statistics.
        network: what the teacher is; training-time settings of the file may differ.
    """

    name: str
    teacher: Source
    reference: Source
    reference_images: int
    features: Source
    network: NetworkConfig
    terms: str

    def sources(self) -> dict[Role, Source]:
        """In the order in which they are needed."""
        return {"features": self.features, "teacher": self.teacher, "reference": self.reference}


_EDM_TERMS = "CC BY-NC-SA 4.0, not for commercial use; see https://github.com/NVlabs/edm"

INCEPTION = Source(
    path="stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    size=95_607_719,
)

CATALOGUE = {
    made.name: made
    for made in (
        Entry(
            name="cifar10",
            teacher=Source(
                path="edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl",
                sha256="4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
            ),
            reference=Source(path="edm/fid-refs/cifar10-32x32.npz"),
            reference_images=50_000,
            features=INCEPTION,
            network=NetworkConfig.ddpmpp(img_resolution=32, augment_dim=9, dropout=0.13),
            terms=_EDM_TERMS,
        ),
        Entry(
            name="imagenet64",
            teacher=Source(path="edm/pretrained/edm-imagenet-64x64-cond-adm.pkl"),
            reference=Source(path="edm/fid-refs/imagenet-64x64.npz"),
            reference_images=1_281_167,
            features=INCEPTION,
            network=NetworkConfig.adm(img_resolution=64, label_dim=1000),
            terms=_EDM_TERMS,
        ),
    )
}


def entry(name: str) -> Entry:
    """What is known about a teacher.

    Raises:
        BadValue: no teacher of that name; the message names the nearest.
    """
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(CATALOGUE)}"
        raise BadValue(f"no teacher {name!r} can be fetched; {hint}")
    return CATALOGUE[name]
