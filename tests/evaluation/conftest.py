import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Threads that wait for each other are slow on a busy machine, and these tests are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def digits():
    """The 1,797 handwritten digits of scikit-learn in a fixed random order: uint8 [1797, 8, 8, 1] and int64 [1797]."""
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    return (15 * bunch.images[order, :, :, None]).astype(np.uint8), bunch.target[order].astype(np.int64)
