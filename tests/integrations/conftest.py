import pytest
import torch

pytest.importorskip("transformers")

from qwen3_kernels.integrations import transformers as integration  # noqa: E402


@pytest.fixture(autouse=True)
def _reverted():
    """No test leaves a patch behind."""
    yield
    integration.revert()


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
