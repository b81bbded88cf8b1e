"""Any model of timm, with what training here asks of a model beside timm's own methods.

Nothing is ever downloaded. Parameters have timm's names with the prefix `INSIDE`, which an export leaves out.

Shapes: B images, C channels, H x W pixels, K classes.
"""

import functools
import inspect
import re
import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.config import nearest
from pipeline.errors import ConfigError, first_line
from pipeline.models.config import TIMM_PREFIX
from pipeline.models.recompute import count_images_once
from pipeline.ops.torchvision_cpu import allow_torchvision

INSIDE = "model."


class TimmModel(nn.Module):
    """A model of timm under this package's interface.

    The arguments are the fields of `TimmConfig`, which describes them.

    Raises:
        ConfigError: timm has no such model, or the model does not take one of the options.
    """

    model: Any

    def __init__(
        self,
        *,
        name: str,
        image_size: tuple[int, int],
        in_chans: int,
        drop_path: float,
        num_classes: int,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        allow_torchvision()
        import timm

        bare = name.removeprefix(TIMM_PREFIX)
        if not timm.is_model(bare):
            close = ", ".join(timm.list_models(f"*{bare.split('.')[0].split('_')[0]}*")[:5])
            raise ConfigError(f"timm has no model {bare!r}" + (f"; similar names: {close}" if close else ""))
        arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, **options}
        try:
            with torch.device("meta"):
                known = inspect.signature(type(timm.create_model(bare, **arguments))).parameters
            if "img_size" in known:  # the others take images of any size
                arguments["img_size"] = image_size
            if drop_path and "drop_path_rate" not in known:
                raise ConfigError(f"timm's {bare} has no drop path; leave out model.drop_path, or set it to 0")
            if drop_path:
                arguments["drop_path_rate"] = drop_path
            self.model = timm.create_model(bare, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"timm's {bare} at {image_size} with {options}: {_unknown_option(bare, first_line(error))}"
            ) from error
        self.timm_name, self.arguments = bare, arguments
        self.image_size, self.num_classes = image_size, num_classes

    @property
    def num_features(self) -> int:
        """Channels of `forward_features`, which `forward_head` reads."""
        return int(self.model.num_features)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> features in the layout of timm's model."""
        return self.model.forward_features(images)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features and classify them: logits (B, K), or the pooled features with `pre_logits`."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K). What the classifier reads, (B, F), is accepted in place of images."""
        return self.model.get_classifier()(images) if images.dim() == 2 else self.model(images)

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; 0 classes for none."""
        self.num_classes = num_classes
        self.model.reset_classifier(num_classes)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass: less memory, more time."""
        count_images_once(self)
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices that timm exempts from weight decay."""
        exempt = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"{INSIDE}{name}" for name in exempt}

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise decay, by timm's grouping; 0 for all if timm has none for this model."""
        return self._layers.get(name, 0)

    @functools.cached_property
    def _layers(self) -> dict[str, int]:
        if not hasattr(self.model, "group_matcher"):
            return {}
        from timm.models import group_parameters

        matcher = self.model.group_matcher(coarse=False)
        found = cast(dict[str, int], group_parameters(self.model, matcher, reverse=True))
        return {f"{INSIDE}{name}": int(layer) for name, layer in found.items()}

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit a state dict in timm's names to this model: timm's filter resizes the position embedding to its grid."""
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        weights = dict(convert(weights, self.model)) if convert else weights
        return {f"{INSIDE}{k}": v for k, v in weights.items()}

    def weights_of(self, source: "TimmModel") -> dict[str, Tensor]:
        """Fit the state dict of the same model at another image size: its absolute position embedding is resized.

        Args:
            source: A model of the same timm name.
        """
        weights = source.state_dict()
        if f"{INSIDE}pos_embed" in weights and hasattr(self.model, "patch_embed"):
            from timm.layers import resample_abs_pos_embed

            # With registers timm's DINOv2 gives the class token no row of its own.
            bare = getattr(self.model, "no_embed_class", False)
            weights[f"{INSIDE}pos_embed"] = resample_abs_pos_embed(
                weights[f"{INSIDE}pos_embed"],
                new_size=self.model.patch_embed.grid_size,
                old_size=source.model.patch_embed.grid_size,
                num_prefix_tokens=0 if bare else getattr(self.model, "num_prefix_tokens", 0),
            )
        return weights

    def fresh(self) -> tuple[str, ...]:
        """Prefixes of the parameters that fine-tuning may initialise anew."""
        heads = self.model.pretrained_cfg.get("classifier") or ()
        return *(f"{INSIDE}{head}." for head in ([heads] if isinstance(heads, str) else heads)), f"{INSIDE}fc_norm."


def _unknown_option(bare: str, said: str) -> str:
    """Add the options of a model that are nearest to the one that it does not know, if that is what was said."""
    import timm

    found = re.search(r"unexpected keyword argument '(\w+)'", said)
    if not found:
        return said
    with torch.device("meta"):
        known = inspect.signature(type(timm.create_model(bare))).parameters
    return f"it has no option {found[1]!r}; near ones: {', '.join(nearest(found[1], list(known))[:6])}"
