"""How a dataset is split, as values (torch-free)."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict


class SplitConfig(Strict):
    """Which samples are labelled, unlabelled and held out; semi-supervised papers leave most of this unsaid.

    Validation is taken first, then the imbalance, then the label fraction. Validation is for thresholds and the
    choice of models; a test set is a dataset of its own.
    """

    imbalance: Annotated[float, Field(ge=1.0)] = 1.0  # head class / tail class; 1 keeps every sample
    profile: Literal["exponential", "supplement"] = "exponential"  # the paper's formula, or its wording (10, 100, 1000)
    relative_to: Literal["largest", "own"] = "largest"  # what n_max is: the largest class, or each class's own size
    class_order: Literal["index", "frequency", "random"] = "index"  # head to tail
    scope: Literal["both", "labelled"] = "both"  # labelled: whatever is not labelled stays, as unlabelled
    ood_classes: Annotated[int, Field(ge=0)] = 0  # the last of the order, never labelled and not in validation
    ood_scope: Literal["all", "labelled"] = "all"  # all: not among the unlabelled either
    labelled: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # fraction of each class that keeps its label
    min_labelled_per_class: Annotated[int, Field(ge=0)] = 1
    rounding: Literal["random", "nearest"] = "random"  # of counts; random keeps their mean, seeded per class
    validation_per_class: Annotated[int, Field(ge=0)] = 0  # balanced
    labelled_list: str = ""  # file naming exactly the labelled samples, as ImageNet's published 1 % and 10 %
    pool_list: str = ""  # file naming all that may be trained on, as ImageNet-LT's

    @model_validator(mode="after")
    def _lists_stand_alone(self) -> "SplitConfig":
        if self.labelled_list and (self.imbalance > 1 or self.labelled < 1 or self.ood_classes):
            raise ValueError("labelled_list alone says which samples are labelled; leave out imbalance, labelled, ood")
        if self.profile == "supplement" and self.imbalance not in (1, 10, 100, 1000):
            raise ValueError(f"profile = supplement describes imbalance 10, 100 and 1000, not {self.imbalance:g}")
        return self
