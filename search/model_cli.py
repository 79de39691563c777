"""Commands about model files: import, fetch and train teachers, import features, make reference statistics."""

from pathlib import Path

import click

from bdense_core import assets
from bdense_core.dataset_names import DATASET_NAMES
from bdense_core.errors import BadValue
from bdense_core.files import sha256_of_file
from bdense_core.protocol import INCEPTION
from search.catalogue import CATALOGUE, entry
from search.console import device_option, format_option, load_settings, print_values, threads_option
from search.datasets import PUBLISHED, find_dataset, published
from search.logs import say

_path = click.Path(path_type=Path)
_NAMES = ", ".join((*DATASET_NAMES, *PUBLISHED))
_DATASET = f"A folder or .zip of images, a folder of CIFAR's binary version, a .npz, or one of {_NAMES}."
name_option = click.option("--name", metavar="NAME", help="What study files call it; default: the file's.")


@click.command()
@click.argument("file", metavar="FILE", type=_path)
@name_option
@format_option("yaml", "json")
def import_teacher(file: Path, name: str | None, form: str) -> None:
    """Turn an EDM checkpoint or DDPM's weights into safetensors, executing nothing in them."""
    from bdense_core.checkpoints import import_network
    from bdense_core.integrity import read_metadata

    target = _target(name or file.stem, "teacher.safetensors")
    made = import_network(file, target)
    about = read_metadata(made.path)
    print_values({"teacher": name or file.stem, "path": made.path, "sha256": made.sha256, **about}, form)


@click.command()
@click.argument("name", metavar="cifar10|imagenet64")
@click.option(
    "--from", "source", type=_path, help="A folder with the published files (or one of them), instead of the network."
)
@click.option("--sha256", "pins", metavar="ROLE=HASH", multiple=True, help="What teacher, reference, features hash to.")
@click.option("--base-url", metavar="URL", help="A mirror of the publisher's server.")
@format_option("yaml", "json")
def fetch_teacher(name: str, source: Path | None, pins: tuple[str, ...], base_url: str | None, form: str) -> None:
    """Get a published teacher, its reference statistics and the Inception network."""
    from search.fetch import fetch
    from search.progress import Downloads

    settings = load_settings()
    settings.create(settings.models)
    if source is None:
        say("from " + ", ".join(source.url(base_url) for source in entry(name).sources().values()))
    with Downloads() as downloads:
        fetched = fetch(
            name,
            settings.models,
            say=say,
            source=source,
            base_url=base_url,
            sha256=_pins(pins),
            progress=downloads.progress,
        )
    files: dict[str, object] = {
        found.role: {"path": str(found.path), "sha256": found.sha256, "source_sha256": found.source_sha256}
        for found in fetched
    }
    print_values({"fetched": name, **files}, form)


@click.command()
@click.argument("name", metavar="cifar10|cifar100")
@click.option("--from", "source", type=_path, help="The published archive, or a folder with it: no network is used.")
@format_option("yaml", "json")
def fetch_dataset(name: str, source: Path | None, form: str) -> None:
    """Get a published training set, which study files and --dataset then know by its name."""
    from search.dataset_fetch import fetch_training_set
    from search.progress import Downloads

    wanted, settings = published(name), load_settings()
    with Downloads() as downloads:
        models = settings.create(settings.models)
        path = fetch_training_set(wanted, models, say=say, source=source, progress=downloads.progress)
    print_values({"fetched": name, "path": str(path), "sha256": sha256_of_file(path)}, form)


@click.command()
@click.argument("file", metavar="FILE.safetensors", type=_path)
@name_option
@format_option("yaml", "json")
def import_features(file: Path, name: str | None, form: str) -> None:
    """Take a CIFAR ResNet's weights as a feature network: its distance is fd-NAME, never FID.

    \b
    It reads images of 3x32x32. The file's keys are
    conv1.weight, bn1.*, layer1.0.conv1.weight, ..., layer3.N.bn2.*, linear.*
    """
    from bdense_core.feature_networks import CifarResNet
    from bdense_core.features import import_features as import_file

    made = import_file(file, _target(name or file.stem, "features.safetensors"), name=name or file.stem)
    images = list(CifarResNet.image_shape)
    print_values(
        {"features": name or file.stem, "reads_images": images, "path": made.path, "sha256": made.sha256}, form
    )


@click.command()
@click.option("--dataset", help=_DATASET)
@click.option("--statistics", type=_path, help="Instead: a published .npz of mu and sigma, as EDM's and clean-fid's.")
@click.option("--images", type=click.IntRange(min=2), help="With --statistics: how many images they are of.")
@click.option("--features", required=True, help="A feature network's name or file.")
@click.option("--name", required=True, metavar="NAME", help="What study files call it.")
@device_option
@threads_option
@format_option("yaml", "json")
def reference(
    dataset: str | None,
    statistics: Path | None,
    images: int | None,
    features: str,
    name: str,
    device: str,
    form: str,
) -> None:
    """Make the reference statistics that a study is scored against, from a data set or from published ones."""
    from search.training import make_reference

    if (dataset is None) == (statistics is None) or (statistics is None) != (images is None):
        raise BadValue("give either --dataset DATA, or --statistics FILE.npz with --images N")
    target = _target(name, "reference.safetensors")
    models = load_settings().models
    images_of = None if dataset is None else _dataset(dataset, models)
    made = make_reference(
        target, models, features=features, dataset=images_of, statistics=statistics, images=images, device=device
    )
    print_values({"reference": name, **made}, form)


@click.command()
@click.option("--dataset", required=True, help=_DATASET)
@click.option("--name", required=True, metavar="NAME", help="What study files call it.")
@click.option("--channels", default=64, show_default=True, type=click.IntRange(min=4), help="Width; EDM's is 128.")
@click.option("--kimg", default=2000.0, show_default=True, type=click.FloatRange(min=0, min_open=True), help="Budget.")
@click.option("--batch", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--lr", default=1e-3, show_default=True, type=click.FloatRange(min=0, min_open=True))
@click.option("--seed", default=0, show_default=True)
@click.option("--conditional", is_flag=True, help="Tell the network the labels.")
@click.option("--guided", is_flag=True, help="Train as DASH does: classes, for guidance, and TIRT's curriculum.")
@click.option("--flip", is_flag=True, help="Mirror images at random.")
@click.option("--precision", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@device_option
@threads_option
@format_option("yaml", "json")
def train_teacher(
    dataset: str,
    name: str,
    channels: int,
    kimg: float,
    batch: int,
    lr: float,
    seed: int,
    conditional: bool,
    guided: bool,
    flip: bool,
    precision: str,
    device: str,
    form: str,
) -> None:
    """Train a teacher as EDM does, or as DASH does; run it again after an interruption, and it goes on."""
    if channels % (4 if channels <= 128 else 32):
        raise BadValue(f"--channels is {channels}; give a multiple of 4, above 128 one of 32")
    from bdense_core.loops.dash_teacher import TeacherTraining
    from bdense_core.pretraining import Pretraining
    from search.training import AsDASH, AsEDM, train

    if guided and (flip or precision != "float32"):
        raise BadValue("--guided trains in float32 and mirrors nothing; leave --flip and --precision out")
    recipe: AsEDM | AsDASH
    warmup, halflife = min(1000.0, kimg / 20), min(500.0, kimg / 20)
    if guided:
        ema = min(0.9999, 0.5 ** (batch / 1000 / halflife))
        recipe = AsDASH(TeacherTraining(seed=seed, budget_kimg=kimg, batch=batch, lr=lr, ema=ema), channels)
    else:
        settings = Pretraining(
            seed=seed, budget_kimg=kimg, batch=batch, lr=lr, warmup_kimg=warmup, ema_halflife_kimg=halflife,
            flip=flip, precision=precision,  # type: ignore[arg-type]
        )  # fmt: skip
        recipe = AsEDM(settings, channels, conditional)
    target, images = _target(name, "teacher.safetensors"), _dataset(dataset, load_settings().models)
    print_values(train(images, recipe, target, device=device), form)


COMMANDS = (import_teacher, fetch_teacher, fetch_dataset, import_features, reference, train_teacher)


def _target(name: str, file: str) -> Path:
    """Where a model's file goes.

    Raises:
        BadValue: the name is none, or taken.
    """
    settings = load_settings()
    if Path(name).name != name or name.startswith("."):
        raise BadValue(f"--name is {name!r}; give a plain name without slashes, such as my-teacher")
    if name in {*CATALOGUE, INCEPTION, *(asset.partition("/")[0] for asset in assets.names())}:
        raise BadValue(f"the name {name!r} stands for a shipped or published model; choose another --name")
    target = settings.create(settings.models) / name / file
    if target.exists():
        raise BadValue(f"there is already {target}; choose another --name, or delete it")
    return target


def _dataset(name: str, models: Path) -> str:
    """What `data.load` is to be given: a published data set goes by its name once it was fetched.

    Raises:
        MissingFile: it was not fetched.
    """
    return find_dataset(name, folder=Path(), models=models) if name in PUBLISHED else name


def _pins(texts: tuple[str, ...]) -> dict[str, str]:
    pins = dict(text.partition("=")[::2] for text in texts)
    if bad := [text for text in texts if "=" not in text]:
        raise BadValue(f"--sha256 wants ROLE=HASH, got {bad[0]!r}; for example --sha256 teacher=4d5d...")
    return pins
