import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """The models here are tiny: more threads would only wait for each other, long when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
