"""Pictures for the board during training: the views that a stage trains on, and where its model looks."""

import logging
from collections.abc import Mapping

import numpy as np
from torch import nn

from pipeline.datasets.manifest import Manifest
from pipeline.errors import PipelineError
from pipeline.evaluate.gradcam import gradcam, overlay
from pipeline.exports.card import Preprocessing
from pipeline.report.pictures import captioned, to_pixels
from pipeline.report.tensorboard import Board
from pipeline.storage.config import RemoteConfig
from pipeline.streaming.loader import Batch, Loader, evaluation_batches
from pipeline.streaming.transforms import View, eval_views
from pipeline.train.task import Task

logger = logging.getLogger(__name__)

NUM_PICTURES = 8


def spread(manifest: Manifest, sample_indices: np.ndarray, number: int, view: View, remote: RemoteConfig) -> Batch:
    """Load samples spread evenly over `sample_indices`, the same on every rank.

    Args:
        manifest: The dataset.
        sample_indices: The samples to choose from.
        number: How many; fewer if there are fewer.
        view: The transform of each image.
        remote: How remote shards are fetched.
    """
    chosen = sample_indices[np.linspace(0, len(sample_indices) - 1, min(number, len(sample_indices))).astype(int)]
    batches = evaluation_batches(
        manifest, chosen, batch_size=len(chosen), rank=0, world_size=1, views=view, remote=remote
    )
    return next(iter(batches))


def show_views(
    board: Board,
    step: int,
    task: Task,
    model: nn.Module | None,
    streams: Mapping[str, Loader],
    manifest: Manifest,
    look: Preprocessing,
) -> None:
    """Draw images of each stream as they are trained on; with a `model`, with the task's caption under each."""
    for name, stream in streams.items():
        batch = spread(manifest, stream.order.sample_indices, NUM_PICTURES, stream.views, stream.config.remote)
        captions = task.captions(model, batch) if model is not None else None
        views = {"view": batch.images} if batch.strong is None else {"weak": batch.images, "strong": batch.strong}
        pixels = [to_pixels(view, look.mean, look.std) for view in views.values()]
        words = captions or [""] * len(batch)
        board.image(f"views/{name}", captioned(pixels, list(views), [words, [""] * len(batch)]), step)


def show_attribution(
    board: Board,
    step: int,
    model: nn.Module,
    manifest: Manifest,
    sample_indices: np.ndarray,
    image_size: tuple[int, int],
    look: Preprocessing,
    remote: RemoteConfig,
) -> None:
    """Draw where a classifier looks (Grad-CAM) and what it predicts.

    `model` is the bare module, because DeepSpeed's wrapper would take a backward pass for a step.
    """
    batch = spread(
        manifest,
        sample_indices,
        NUM_PICTURES,
        eval_views(image_size, mean=look.mean, std=look.std, view=look.view, decoding=look.decoding),
        remote,
    )
    try:
        images = batch.images.to(next(model.parameters()).device)
        maps, predicted = gradcam(model, images, among=len(manifest.classes))
    except (PipelineError, RuntimeError, IndexError) as error:  # an unknown layout is no reason to stop
        logger.warning("no attribution maps: %s", error)
        return
    pairs = zip(predicted.tolist(), batch.labels.tolist(), strict=True)
    said = [f"{manifest.classes[a]}{'' if a == t else f' (is {manifest.classes[t]})'}" for a, t in pairs]
    rows = [to_pixels(batch.images, look.mean, look.std), overlay(batch.images, maps.cpu(), look.mean, look.std)]
    board.image("attribution", captioned(rows, ["image", "Grad-CAM"], [said, [""] * len(said)]), step)
