"""Download timm's weights to disk, for nodes without a network. This is the only module that downloads anything.

A training reads the file that this leaves, and says how to get it where it is missing. timm and torch are imported late.
"""

from pathlib import Path

from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError, first_line
from pipeline.files import replacing
from pipeline.models.config import TIMM_PREFIX

COMMAND = "python -m pipeline.models prefetch"


def missing_weights(path: Path, name: str) -> HandoverError:
    """Return the error for a model without its weights file.

    Args:
        path: Where the file was expected.
        name: The model's name in the config, with the prefix `timm/` for timm's.
    """
    bare = name.removeprefix(TIMM_PREFIX)
    remedy = f", or run {COMMAND} {bare} --out {path.parent} where there is a network" if bare != name else ""
    return HandoverError(
        f"no weights at {path} for {bare}; put the file there{remedy}: nothing is downloaded in training"
    )


def prefetch(name: str, folder: Path) -> Path:
    """Download timm's weights of a model to `folder`/NAME.safetensors, whole or absent. An existing file is kept.

    Args:
        name: timm's name of the model and its weights, as in resnet50.a1_in1k; without a tag, timm's default weights.
        folder: Where to write.

    Returns:
        The file.

    Raises:
        ConfigError: If timm has no weights of this name.
        EnvironmentProblem: If the hub cannot be reached.
    """
    from pipeline.ops.torchvision_cpu import allow_torchvision

    allow_torchvision()
    import timm

    from pipeline.exports.tensors import write_tensors

    bare = name.removeprefix(TIMM_PREFIX)
    path = folder / f"{bare}.safetensors"
    if path.is_file():
        return path
    if not timm.is_model_pretrained(bare):
        model = bare.split(".")[0]
        known = timm.list_models(f"{model}*", pretrained=True) or timm.list_models(
            f"{model.split('_')[0]}*", pretrained=True
        )
        raise ConfigError(
            f"timm has no weights for {bare!r}" + (f"; similar names: {', '.join(known[:5])}" if known else "")
        )
    try:
        weights = timm.create_model(bare, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise EnvironmentProblem(
            f"the weights of {bare} could not be downloaded ({said}); run {COMMAND} {bare} --out FOLDER"
            f" where there is a network, and copy {path.name} to {folder}"
        ) from None
    with replacing(path) as temporary:
        write_tensors(temporary, {key: value.contiguous() for key, value in weights.items()})
    return path
