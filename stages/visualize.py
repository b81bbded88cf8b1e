"""What people look at while a stage trains: the views as they are trained on, where the model looks, how sure it is."""

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
from pipeline.streaming.loader import Batch, Loader, evaluation_batches
from pipeline.streaming.transforms import View, eval_views
from pipeline.train.task import Task

logger = logging.getLogger(__name__)

NUM_PICTURES = 8


def spread(manifest: Manifest, sample_indices: np.ndarray, number: int, view: View) -> Batch:
    """`number` samples spread over `sample_indices`, alike on every rank."""
    chosen = sample_indices[np.linspace(0, len(sample_indices) - 1, min(number, len(sample_indices))).astype(int)]
    return next(iter(evaluation_batches(manifest, chosen, batch_size=len(chosen), rank=0, world_size=1, views=view)))


def show_views(
    board: Board,
    step: int,
    task: Task,
    model: nn.Module | None,
    streams: Mapping[str, Loader],
    manifest: Manifest,
    look: Preprocessing,
) -> None:
    """The first images of each stream as they are trained on; with a `model`, under each what the task says of it."""
    for name, stream in streams.items():
        batch = spread(manifest, stream.order.sample_indices, NUM_PICTURES, stream.views)
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
) -> None:
    """Where a classifier looks, and what it says. `model` is bare: a backward pass through
    DeepSpeed's wrapper is a step to it."""
    batch = spread(manifest, sample_indices, NUM_PICTURES, eval_views(image_size, mean=look.mean, std=look.std))
    try:
        maps, answers = gradcam(model, batch.images.to(next(model.parameters()).device))
    except (PipelineError, RuntimeError, IndexError) as error:  # a layout nobody foresaw: no reason to stop
        logger.warning("no attribution maps: %s", error)
        return
    pairs = zip(answers.tolist(), batch.labels.tolist(), strict=True)
    said = [f"{manifest.classes[a]}{'' if a == t else f' (is {manifest.classes[t]})'}" for a, t in pairs]
    rows = [to_pixels(batch.images, look.mean, look.std), overlay(batch.images, maps.cpu(), look.mean, look.std)]
    board.image("attribution", captioned(rows, ["image", "Grad-CAM"], [said, [""] * len(said)]), step)
