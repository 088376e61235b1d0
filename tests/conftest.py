"""What tests in several folders start from."""

from collections.abc import Iterator
from pathlib import Path

import pytest

for _path in Path(__file__).parent.iterdir():  # helpers fail with details, too
    if _path.suffix == ".py" and _path.stem not in ("__init__", "conftest"):
        pytest.register_assert_rewrite(f"tests.{_path.stem}")
    elif (_path / "__init__.py").exists():
        pytest.register_assert_rewrite(f"tests.{_path.name}")

from hf_lowrank.compression import recipe  # noqa: E402
from tests.tiny_models import Batch, tiny_llama, written_batches  # noqa: E402


@pytest.fixture(autouse=True)
def ranks_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test leaves open is ranks alone, but for tests of what is chosen by default."""
    with pytest.MonkeyPatch.context() as patch:  # a test may undo its own
        if "default_recipe" not in request.keywords:
            for name in recipe.RECIPES:
                patch.setitem(recipe.RECIPES, name, {"channels": False, "measured_prices": False})
        yield


@pytest.fixture(scope="session")
def text() -> list[Batch]:
    """Twelve batches that the dense tiny Llama wrote, to be shared out by each test."""
    return written_batches(tiny_llama(), num_batches=12)
