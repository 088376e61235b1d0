"""What tests in several folders start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

for _path in Path(__file__).parent.iterdir():  # helpers fail with details, too
    if _path.suffix == ".py" and _path.stem not in ("__init__", "conftest"):
        pytest.register_assert_rewrite(f"tests.{_path.stem}")
    elif (_path / "__init__.py").exists():
        pytest.register_assert_rewrite(f"tests.{_path.name}")

from hf_lowrank import config  # noqa: E402
from hf_lowrank.compression import recipe  # noqa: E402
from tests.tiny_models import Batch, tiny_llama, written_batches  # noqa: E402

RECIPES = dict(recipe.RECIPES)
FORM = config.DEFAULT_FORM
RANKS_ALONE = {"channels": False, "measured_prices": False}


@pytest.fixture(autouse=True, scope="session")
def ranks_alone() -> Iterator[None]:
    """What a test or a fixture leaves open is ranks alone, as two factors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "DEFAULT_FORM", "factors")
        for name in RECIPES:
            patch.setitem(recipe.RECIPES, name, RANKS_ALONE)
        yield


@pytest.fixture(autouse=True)
def default_recipe(request: pytest.FixtureRequest) -> Iterator[None]:
    """But tests marked `default_recipe` get what a user gets."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        if "default_recipe" in request.keywords:
            patch.setattr(config, "DEFAULT_FORM", FORM)
            for name, chosen in RECIPES.items():
                patch.setitem(recipe.RECIPES, name, chosen)
        yield


@pytest.fixture(scope="session")
def text() -> list[Batch]:
    """Twelve batches that the dense tiny Llama wrote, to be shared out by each test."""
    return written_batches(tiny_llama(), num_batches=12)
