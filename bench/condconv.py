"""timm's CondConv2d, for comparison, without the torchvision that importing timm asks for."""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any
from unittest import mock


def condconv2d() -> Any:
    """``timm.layers.CondConv2d``.

    Its file needs torch alone, but the packages around it import torchvision, whose wheels load only into the
    torch that they were built with. So the packages are made without being run.
    """
    with mock.patch.dict(sys.modules):
        for name in ("timm", "timm.layers"):
            spec = find_spec(name)
            assert spec is not None, "pip install --no-deps timm"
            sys.modules[name] = module_from_spec(spec)
        return import_module("timm.layers.cond_conv2d").CondConv2d
