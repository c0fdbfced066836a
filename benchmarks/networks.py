"""Networks of many packages by name, small where they can be, each with an example call."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from mpq import _torchvision
from mpq.capture.network import Network

Factory = Callable[[], Network]


def images(side: int, count: int = 2, channels: int = 3) -> torch.Tensor:
    """Noise from 0 to 1, `[count, channels, side, side]`."""
    return torch.rand(count, channels, side, side)


# -- torchvision -----------------------------------------------------------------------------------

CLASSIFIERS = """
alexnet vgg11_bn resnet18 squeezenet1_1 densenet121 shufflenet_v2_x0_5 mobilenet_v2
mobilenet_v3_small mnasnet0_5 regnet_y_400mf efficientnet_b0 convnext_tiny swin_t swin_v2_t
"""
SEGMENTERS = """
lraspp_mobilenet_v3_large fcn_resnet50 fcn_resnet101 deeplabv3_mobilenet_v3_large
deeplabv3_resnet50 deeplabv3_resnet101
"""
DETECTORS = """
ssdlite320_mobilenet_v3_large ssd300_vgg16 retinanet_resnet50_fpn fcos_resnet50_fpn
fasterrcnn_mobilenet_v3_large_320_fpn
"""


def classifier(name: str, side: int = 64, **options: Any) -> Network:
    """A classifier of torchvision."""
    made = _torchvision.models().get_model(name, weights=None, num_classes=10, **options)
    return Network(made, (images(side),))


def segmenter(name: str) -> Network:
    """A segmentation network: a dict of maps."""
    made = _torchvision.models().get_model(name, weights=None, weights_backbone=None)
    return Network(made, (images(64),))


class Body(nn.Module):
    """Features and heads of a detector, without what decodes boxes."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = getattr(detector, "head", None) or detector.rpn.head

    def forward(self, x: torch.Tensor) -> Any:
        """Answers of the heads for a batch of images."""
        found = self.backbone(x)
        return self.head(list(found.values()))


def detector_body(name: str) -> Network:
    """The convolutional part of a detector."""
    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    made = _torchvision.models().get_model(name, **options)
    return Network(Body(made), (images(320 if "ssd" in name else 64),))


# -- other packages --------------------------------------------------------------------------------

TIMM = """
resnet18d efficientnet_lite0 mobilenetv4_conv_small repvgg_a0 ghostnet_100 hrnet_w18_small dla34
res2net50_26w_4s ese_vovnet19b_dw nf_regnet_b0 convnextv2_atto levit_128s mobilevit_xxs
edgenext_xx_small fastvit_t8 efficientformer_l1 vit_tiny_patch16_224 pvt_v2_b0
xcit_nano_12_p16_224 coat_lite_tiny mixer_s32_224 poolformer_s12 crossvit_tiny_240
twins_pcpvt_small maxvit_rmlp_pico_rw_256 tiny_vit_5m_224 repvit_m0_9 efficientvit_b0 skresnet18
selecsls42 halonet26t convit_tiny davit_tiny sequencer2d_s tf_efficientnet_b0 cspresnet50 dpn48b
ecaresnet26t gernet_s hardcorenas_a inception_next_atto lambda_resnet26t lcnet_050
mambaout_femto mnasnet_small nfnet_l0 regnetx_002 resmlp_12_224 rexnet_100 starnet_s1 tinynet_e
visformer_tiny xception41 beit_base_patch16_224 cait_xxs24_224 deit_tiny_patch16_224
eva02_tiny_patch14_224 gmlp_ti16_224 hiera_tiny_224 nest_tiny pit_ti_224 volo_d1_224
focalnet_tiny_srf ghostnetv2_100 vovnet39a
"""


def timm(name: str) -> Network:
    """A network of timm at its own size."""
    _torchvision.models()
    made = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10)
    return Network(made, (images(made.default_cfg["input_size"][-1]),))


def segmentation_models(kind: str) -> Network:
    """A network of segmentation_models_pytorch."""
    _torchvision.models()
    package = importlib.import_module("segmentation_models_pytorch")
    return Network(getattr(package, kind)("resnet18", encoder_weights=None), (images(64),))


def yolo(name: str) -> Network:
    """A detector of ultralytics."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    return Network(tasks.DetectionModel(f"{name}.yaml", verbose=False), (images(64),))


def mtcnn(kind: str, side: int) -> Network:
    """A face detector of facenet-pytorch."""
    _torchvision.models()
    package = importlib.import_module("facenet_pytorch.models.mtcnn")
    return Network(getattr(package, kind)(pretrained=False), (images(side),))


TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mobilevit": (
        "MobileViT:ImageClassification",
        {
            "hidden_sizes": [32, 48, 64],
            "neck_hidden_sizes": [16, 32, 48, 64, 64, 64, 128],
            "image_size": 64,
        },
    ),
    "segformer": ("Segformer:SemanticSegmentation", {}),
    "mobilenet_v2": ("MobileNetV2:SemanticSegmentation", {"image_size": 64}),
    "yolos": (
        "Yolos:ObjectDetection",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": [64, 64],
            "num_detection_tokens": 10,
        },
    ),
    "vit": (
        "ViT:ImageClassification",
        {
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "image_size": 64,
        },
    ),
    "resnet": ("ResNet:ImageClassification", {}),
    "convnext": ("ConvNext:ImageClassification", {}),
    "dpt": ("DPT:DepthEstimation", {"image_size": 64, "patch_size": 16}),
}


def transformer(name: str) -> Network:
    """A vision network of transformers, made from its configuration."""
    package = importlib.import_module("transformers")
    (family, task), options = TRANSFORMERS[name][0].split(":"), TRANSFORMERS[name][1]
    config = getattr(package, f"{family}Config")(**options)
    return Network(getattr(package, f"{family}For{task}")(config), (images(64),))


NETWORKS: dict[str, Factory] = {
    **{f"torchvision:{n}": partial(classifier, n) for n in CLASSIFIERS.split()},
    "torchvision:inception_v3": partial(classifier, "inception_v3", 96, init_weights=False),
    "torchvision:googlenet": partial(classifier, "googlenet", init_weights=False),
    "torchvision:vit_b_32": partial(classifier, "vit_b_32", 224),
    "torchvision:maxvit_t": partial(classifier, "maxvit_t", 224),
    **{f"segmentation:{n}": partial(segmenter, n) for n in SEGMENTERS.split()},
    **{f"detection:{n}": partial(detector_body, n) for n in DETECTORS.split()},
    **{f"timm:{n}": partial(timm, n) for n in TIMM.split()},
    **{f"smp:{n}": partial(segmentation_models, n) for n in ("Unet", "FPN", "DeepLabV3Plus")},
    **{f"ultralytics:{n}": partial(yolo, n) for n in ("yolov8n", "yolo11n")},
    **{f"transformers:{n}": partial(transformer, n) for n in TRANSFORMERS},
    "facenet:PNet": partial(mtcnn, "PNet", 24),
    "facenet:RNet": partial(mtcnn, "RNet", 24),
    "facenet:ONet": partial(mtcnn, "ONet", 48),
}
"""Factories by `package:name`."""
