"""What a distance may be compared with: only values of an equal protocol (spec/fid.md). No torch here."""

from dataclasses import asdict, dataclass

from bdense_core.errors import EvaluationError
from bdense_core.files import sha256_of

INCEPTION = "inception"
"""The one feature network whose distance is called FID."""
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""The one file that holds it: inception-2015-12-05.pt as NVIDIA publishes it, the network of EDM's and SFD's FIDs."""
UINT8 = "uint8: (x * 127.5 + 128).clip(0, 255)"
"""How EDM prepares images for the features (arXiv 2206.00364, its public code)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What two distances must have in common to be compared.

    Attributes:
        features: name of the feature network.
        features_sha256: hash of its weights.
        image_preparation: how images become its input, such as `uint8-legacy-tensorflow`.
        reference_sha256: hash of the reference statistics' file.
        n_samples: number of generated images.
    """

    features: str
    features_sha256: str
    image_preparation: str
    reference_sha256: str
    n_samples: int

    @property
    def metric(self) -> str:
        """`fid` for Inception features, else `fd-` and the features' name."""
        return "fid" if self.features == INCEPTION else f"fd-{self.features}"

    def to_dict(self) -> dict[str, str | int]:
        """The protocol as plain JSON values."""
        return asdict(self)

    def hash(self) -> str:
        """sha256 of the protocol, equal for equal protocols on any machine."""
        return sha256_of(self.to_dict())


def require_same_protocol(first: Protocol, *others: Protocol) -> None:
    """Refuses to compare distances of different protocols.

    Raises:
        EvaluationError: they differ; the message names each field and its values.
    """
    for other in others:
        mine, theirs = first.to_dict(), other.to_dict()
        if unlike := [f"{key} {mine[key]} and {theirs[key]}" for key in mine if mine[key] != theirs[key]]:
            raise EvaluationError(
                f"distances of different protocols cannot be compared: {'; '.join(unlike)}; make them alike"
            )
