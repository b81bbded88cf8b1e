from pipeline.classifier import Classifier as Classifier
from pipeline.classifier import Prediction as Prediction
from pipeline.classifier import load as load
from pipeline.notebook import Result as Result
from pipeline.notebook import run_stage as run_stage

__version__: str
