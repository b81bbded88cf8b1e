"""Which class builds the models of which family."""

from torch import nn

from pipeline.models.config import EfficientViMConfig, TimmConfig, VisionMambaConfig, VSSDConfig, WideResNetConfig
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.family import FamilyConfig
from pipeline.models.timm_model import TimmModel
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vssd import VSSD
from pipeline.models.wide_resnet import WideResNet

# Each class takes the arguments that its config's `arguments()` gives.
MODEL_CLASSES: dict[type[FamilyConfig], type[nn.Module]] = {
    VisionMambaConfig: VisionMamba,
    EfficientViMConfig: EfficientViM,
    VSSDConfig: VSSD,
    WideResNetConfig: WideResNet,
    TimmConfig: TimmModel,
}
