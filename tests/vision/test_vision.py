"""Models of torchvision and timm obey the laws: the call is the merged module, state is returned, vmap is the loop."""

import pytest

NETS = ["resnet", "vit", "convnext", "mobilenet", "timm_vit", "timm_vit_tiny", "timm_mixer"]
NAMES = [
    *[f"merge {net} {method}" for net in NETS for method in ("lora", "gift")],
    *[f"merge {net} {m}" for net in ("resnet", "vit", "timm_vit", "mobilenet") for m in ("ia3", "dora", "chain")],
    *[f"merge {net} packed" for net in ("vit", "timm_vit", "timm_vit_tiny")],
    *[f"statistics resnet {method}" for method in ("lora", "gift")],
    *[f"vmap {net} {m}" for net in ("resnet", "vit", "timm_vit", "convnext") for m in ("lora", "gift")],
    "vmap statistics resnet",
    "merge resnet balanced",
    "table resnet balanced",
    "count resnet svdiff",
    *[f"addin {net} {m}" for net in ("vit", "timm_vit") for m in ("adaptformer", "convpass", "vpt", "vqt", "ssf")],
    "addin timm_vit_tiny fact",
    *[f"steps timm_vit {m}" for m in ("adaptformer", "vpt")],
    *[f"presets {net}" for net in ("vit", "timm_vit")],
]


@pytest.mark.slow
def test_every_check_is_named_here(report):
    assert list(report) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_vision_model_obeys(report, name):
    assert report[name].strip() == "ok", report[name]
