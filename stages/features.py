"""Cached features: a frozen backbone sees each fixed view of each image once, and the classifier trains on what it gives.

Training then decodes no image, so a classifier trains in seconds on a laptop. What it costs: an image has
`backbone.cached_views` views instead of a new one each time, and mixing images is not possible. Features are fp32 whatever the
precision of training. Validation and test images, whose view is one, are computed once too.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import seeds
from pipeline.errors import ConfigError, EnvironmentProblem, PipelineError
from pipeline.evaluate.predictions import gather
from pipeline.exports.headers import read_safetensors_header
from pipeline.exports.tensors import write_tensors
from pipeline.files import replacing
from pipeline.models.backbone.adapt import heads_of
from pipeline.models.backbone.config import BackboneConfig
from pipeline.models.timm_model import TimmModel
from pipeline.streaming.loader import Loader, evaluation_batches
from pipeline.train.distributed import any_rank
from stages.context import StageContext

logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.5  # cached features may fill this share of the free memory
TOLERANCE = 1e-5


class Backbone:
    """Images to the classifier's input, for a model whose backbone is frozen.

    Args:
        model: The whole model.

    Raises:
        ConfigError: The model has not exactly one classifier that reads one vector for each image.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, TimmModel):
            raise ConfigError("backbone.cached_views is for models of timm (timm/NAME); set cached_views=0")
        self.model, self.classifier = model, model.model.get_classifier()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> features (B, F), in eval mode."""
        given: list[Tensor] = []
        was_training = self.model.training
        self.model.eval()
        handle = self.classifier.register_forward_pre_hook(lambda _module, inputs: given.append(inputs[0].float()))
        try:
            self.model(images)
        finally:
            handle.remove()
            self.model.train(was_training)
        return given[-1]

    @torch.no_grad()
    def check(self, images: Tensor) -> None:
        """Refuse a model whose logits are not the classifier's output for the features."""
        was_training = self.model.training
        self.model.eval()
        logits, features = self.model(images), self(images)
        same = features.dim() == 2 and torch.allclose(self.model(features), logits, TOLERANCE, TOLERANCE)
        self.model.train(was_training)
        if not same:
            raise ConfigError(
                "backbone.cached_views needs a model whose classifier reads one vector for each image, which this one's does"
                " not; set cached_views=0"
            )


def use_cached_features(
    s: StageContext[Any], model: nn.Module, streams: Mapping[str, Loader], config: BackboneConfig
) -> None:
    """Let the streams and the evaluations of a stage give features in place of images (collective).

    Args:
        s: The stage's context.
        model: The model on the device, whole on every rank.
        streams: The streams, by name.
        config: Says how many views there are, and where they are kept.

    Raises:
        PipelineError: The model does not fit, an image cannot be decoded, or the features do not fit in memory.
    """
    backbone = Backbone(model)
    backbone.check(s.fingerprint_images(model.image_size).to(s.world.device))  # type: ignore[arg-type]
    weights = _weights_hash(model)
    for name, stream in streams.items():
        key = _key(s, name, stream, weights, config.cached_views)
        path = config.cache / f"features-{key}.safetensors" if config.cache else None
        shape = config.cached_views, len(stream.order.sample_indices)
        features = _read(path, stream.views.names, shape) if path else None
        absent = any_rank(features is None, s.world)  # all ranks compute, or none
        if features is None or absent:
            features = _compute(s, backbone, stream, config.cached_views)
            if path and s.world.is_main:
                _write(path, features)
        logger.info("%s: %d views of %d images have cached features", name, *shape)
        stream.use_features(features)
    s.evaluator.features = backbone


def _compute(s: StageContext[Any], backbone: Backbone, stream: Loader, views: int) -> dict[str, Tensor]:
    """Compute (views, samples, F) features of every view of a stream's images, equal on all ranks (collective)."""
    data, indices = s.config.data, stream.order.sample_indices
    found: dict[str, list[Tensor]] = {name: [] for name in stream.views.names}
    for view in range(views):
        rows: dict[str, list[Tensor]] = {name: [] for name in found}
        order = []
        for batch in evaluation_batches(
            s.manifest,
            indices,
            batch_size=data.eval_batch,
            rank=s.world.rank,
            world_size=s.world.size,
            views=stream.views,
            workers=data.loader.workers,
            remote=data.loader.remote,
            seed=seeds.fold(s.config.run.seed, view),
            device=s.world.device,
        ):
            for name in found:
                images = batch.images if name == "images" else batch.strong
                assert images is not None
                rows[name].append(backbone(images))
            order.append(batch.indices)
            if not view and len(order) == 1:
                _check_memory(rows, len(indices) * views)
        places = gather(torch.cat(order))
        real = places.argsort()[int((places < 0).sum()) :]
        for name in found:
            found[name].append(gather(torch.cat(rows[name]))[real].cpu())
    return {name: torch.stack(each) for name, each in found.items()}


def _check_memory(rows: Mapping[str, list[Tensor]], samples: int) -> None:
    needed = sum(each[0].shape[1] for each in rows.values()) * samples * 4
    free = psutil.virtual_memory().available
    if needed > MEMORY_SHARE * free:
        raise EnvironmentProblem(
            f"the cached features need {needed / 1e9:.1f} GB of memory in each process, and {free / 1e9:.1f} GB are free;"
            " lower backbone.cached_views, or set it to 0"
        )


def _weights_hash(model: nn.Module) -> str:
    """Hash the weights and running statistics of all but the classifier."""
    digest, heads = hashlib.sha256(), heads_of(model)
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(heads):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(s: StageContext[Any], name: str, stream: Loader, weights: str, views: int) -> str:
    """Return 32 hex digits that differ when the features would: by the weights, the data, or how the images are prepared."""
    prepared = s.config.model_dump(mode="json", include={"augment", "weak", "strong", "labelled"})
    data = s.config.data.model_dump(mode="json", include={"mean", "std", "ground", "view", "max_pixels"})
    samples = hashlib.sha256(np.ascontiguousarray(stream.order.sample_indices).tobytes()).hexdigest()
    told = [weights, s.manifest.hash, samples, s.config.run.seed, views, name, stream.views.image_size, prepared, data]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:32]


def _read(path: Path, names: tuple[str, ...], shape: tuple[int, ...]) -> dict[str, Tensor] | None:
    """Read kept features; None if they are missing, or damaged, which is logged."""
    if not path.is_file():
        return None
    try:
        claims = read_safetensors_header(path)
        features = load_file(path)
        sound = all(claims[name].shape[:2] == shape and features[name].isfinite().all() for name in names)
    except (PipelineError, SafetensorError, OSError, KeyError) as error:
        logger.warning("%s cannot be used (%s); the features are computed again", path, error)
        return None
    return {name: features[name] for name in names} if sound else None


def _write(path: Path, features: Mapping[str, Tensor]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            write_tensors(temporary, features)
    except OSError as error:
        raise EnvironmentProblem(
            f"backbone.cache: {path} cannot be written ({error.strerror}); give a writable folder, or free space"
        ) from None
