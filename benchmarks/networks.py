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

SEGMENTERS = """
lraspp_mobilenet_v3_large fcn_resnet50 fcn_resnet101 deeplabv3_mobilenet_v3_large
deeplabv3_resnet50 deeplabv3_resnet101
"""
DETECTORS = """
ssdlite320_mobilenet_v3_large ssd300_vgg16 retinanet_resnet50_fpn fcos_resnet50_fpn
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn
fasterrcnn_resnet50_fpn_v2 maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2 keypointrcnn_resnet50_fpn
retinanet_resnet50_fpn_v2
"""


def classifiers() -> list[str]:
    """Names of torchvision's classifiers."""
    models = _torchvision.models()
    return list(models.list_models(module=models))


def classifier(name: str) -> Network:
    """A classifier of torchvision on images of 64 pixels, where it takes them."""
    side, options = 64, {}
    if name.startswith("vit_"):
        side = 56 if name == "vit_h_14" else 64
        options = {"image_size": side}
    elif name in ("googlenet", "inception_v3"):
        side, options = 96, {"init_weights": False}
    elif name == "maxvit_t":
        side = 224
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
beit_base_patch16_224 halonet26t repvgg_a0 cait_xxs24_224 coat_lite_tiny convit_tiny
convmixer_768_32 convnextv2_atto cpubone_nano crossvit_tiny_240 csatv2 cspresnet50 cspnext_tiny
davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla34 dpn48b edgenext_xx_small
efficientformer_l1 efficientformerv2_s0 efficientnet_lite0 efficientvim_m1 efficientvit_b0
efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
gemma4_vit_167m_enc ghostnet_100 hardcorenas_a hgnetv2_b0 hiera_tiny_224 hieradet_small
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small levit_128s lowformer_b0 mambaout_femto maxvit_rmlp_pico_rw_256 poolformer_s12
mixer_s32_224 mobilenetv4_conv_small mobilenetv5_base mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9
res2net50_26w_4s resnest14d resnet18d resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18
sequencer2d_s shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
twins_pcpvt_small vgg11 visformer_tiny vit_tiny_patch16_224 vit_tiny_r_s16_p8_224 test_vit_relpos
samvit_base_patch16_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_dw legacy_xception xception41
xcit_nano_12_p16_224 tf_efficientnet_b0 ecaresnet26t gernet_s lambda_resnet26t lcnet_050
mnasnet_small nfnet_l0 resmlp_12_224 tinynet_e gmlp_ti16_224 ghostnetv2_100 vovnet39a
"""
"""A small member of each family, and of some of their kinds."""


def timm(name: str) -> Network:
    """A network of timm on images of 96 pixels, or of its own size where it takes no other."""
    _torchvision.models()
    made = importlib.import_module("timm").create_model(name, pretrained=False, num_classes=10)
    try:
        with torch.no_grad():
            made.eval()(images(96))
    except (AssertionError, RuntimeError, ValueError):
        return Network(made, (images(made.default_cfg["input_size"][-1]),))
    return Network(made, (images(96),))


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
    "detr": (
        "Detr:ObjectDetection",
        {
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "d_model": 64,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "num_queries": 10,
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
    if name == "detr":
        options = options | {"backbone_config": package.ResNetConfig(out_features=["stage4"])}
    config = getattr(package, f"{family}Config")(**options)
    return Network(getattr(package, f"{family}For{task}")(config), (images(64),))


NETWORKS: dict[str, Factory] = {
    **{f"torchvision:{n}": partial(classifier, n) for n in classifiers()},
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
