"""timm's weights brought to disk beforehand, for nodes without a network: the only place that downloads anything.

No training does: it reads the file that this leaves, and says how to get it where it is missing. Free of torch until used.
"""

import os
from pathlib import Path

from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError
from pipeline.models.config import TIMM_PREFIX

COMMAND = "python -m pipeline.models prefetch"


def missing_weights(path: Path, name: str) -> HandoverError:
    """What to say where a model (by its config's name, with the prefix `timm/` for timm's) finds no file at `path`."""
    bare = name.removeprefix(TIMM_PREFIX)
    remedy = f", or run {COMMAND} {bare} --out {path.parent} where there is a network" if bare != name else ""
    return HandoverError(
        f"no weights at {path} for {bare}; put the file there{remedy}: nothing is downloaded in training"
    )


def prefetch(name: str, folder: Path) -> Path:
    """Download the weights that timm has for `name` (model.tag; without a tag its default) to `folder`/NAME.safetensors.

    The file is whole or absent; one that is there already is kept. Raises ConfigError for a name without weights,
    EnvironmentProblem where the hub cannot be reached.
    """
    from pipeline.ops.torchvision_cpu import allow_torchvision

    allow_torchvision()
    import timm
    from safetensors.torch import save_file

    bare = name.removeprefix(TIMM_PREFIX)
    path = folder / f"{bare}.safetensors"
    if path.is_file():
        return path
    if not timm.is_model_pretrained(bare):
        model = bare.split(".")[0]
        known = timm.list_models(f"{model}*", pretrained=True) or timm.list_models(
            f"{model.split('_')[0]}*", pretrained=True
        )
        raise ConfigError(f"timm has no weights for {bare!r}" + (f"; near it: {', '.join(known[:5])}" if known else ""))
    try:
        weights = timm.create_model(bare, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        raise EnvironmentProblem(
            f"the weights of {bare} could not be downloaded ({said}); run {COMMAND} {bare} --out FOLDER"
            f" where there is a network, and copy {path.name} to {folder}"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.tmp"
    save_file({key: value.contiguous() for key, value in weights.items()}, temporary)
    os.replace(temporary, path)
    return path
