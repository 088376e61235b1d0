"""Stored forms, one per file; each file adds its own to the registry in `stored_form`."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
