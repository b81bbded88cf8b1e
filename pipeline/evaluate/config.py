"""Schema of evaluation (torch-free)."""

from pydantic import Field, PositiveInt

from pipeline.config import Strict


class LinearProbeConfig(Strict):
    """Evaluate features with a linear probe and with nearest neighbours.

    Both learn from the labelled subset and are evaluated on the validation subset. The labels are read for these numbers
    only; no gradient of the training sees them.
    """

    every: PositiveInt | None = Field(
        None,
        description="optimizer steps between two evaluations of the features, a multiple of loop.eval_every;"
        " null = at every evaluation",
    )
    samples: PositiveInt = Field(
        50_000,
        description="maximum number of labelled samples that both learn from, spread evenly over the subset",
    )
    neighbours: PositiveInt = Field(
        20, description="number of nearest neighbours that vote; fewer if there are fewer samples"
    )
    temperature: float = Field(
        0.07, gt=0, description="temperature of the neighbours' votes, each of weight exp(cosine / temperature)"
    )
    weight_decay: float = Field(1e-3, gt=0, description="weight decay of the linear probe, on standardised features")
