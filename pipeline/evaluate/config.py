"""How evaluation is done, as values (torch-free)."""

from pydantic import Field, PositiveInt

from pipeline.config import Strict


class ProbeConfig(Strict):
    """How good features are: a linear probe and a vote of neighbours learn from the labelled part, the validation part judges.

    The labels are read for this number only: no gradient sees them.
    """

    every: PositiveInt | None = Field(
        None, description="optimizer steps, a multiple of loop.eval_every; none = at every evaluation"
    )
    samples: PositiveInt = Field(50_000, description="labelled samples to learn from at most, spread evenly over them")
    neighbours: PositiveInt = Field(20, description="k; fewer where there are fewer samples")
    temperature: float = Field(0.07, gt=0, description="of the neighbours' votes, exp(cosine / temperature)")
    weight_decay: float = Field(1e-3, gt=0, description="of the linear probe, on standardised features")
