import hashlib
import hmac
import pickle

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dpldm_core.rng import SecretKey

KEY = SecretKey(bytes(range(32)))


@given(st.integers(0, 2**63 - 1), st.integers(0, 200))
def test_the_stream_is_aes_of_step_and_block(step, size):
    """FIPS 197 and SP 800-38A by hand: block i of step t is AES(t || i)."""
    blocks = b"".join(step.to_bytes(8, "big") + i.to_bytes(8, "big") for i in range(size // 16 + 1))
    encryptor = Cipher(algorithms.AES(KEY.secret), modes.ECB()).encryptor()
    assert KEY.random_bytes(step, size) == encryptor.update(blocks)[:size]


def test_the_stream_anchor():
    """AES-256 of the zero block under the key 00 01 .. 1f, from any implementation (here: openssl enc -aes-256-ecb)."""
    assert KEY.random_bytes(0, 16).hex() == "f29000b62a499fd0a9f39a6add2e7780"


@given(st.lists(st.text("ab\0é", max_size=9), max_size=3))
def test_derived_keys_are_hkdf(labels):
    """RFC 5869 by hand, one block, no salt; every label is preceded by its length, so no two lists collide."""
    info = b"dpldm/1" + b"".join(len(x.encode()).to_bytes(4, "big") + x.encode() for x in labels)
    extracted = hmac.digest(bytes(32), KEY.secret, hashlib.sha256)
    assert KEY.derive(*labels).secret == hmac.digest(extracted, info + b"\1", hashlib.sha256)


def test_lists_of_labels_do_not_collide():
    lists = [(), ("",), ("a", "b"), ("ab",), ("a", "", "b"), ("b", "a"), ("a",), ("noise",), ("poisson",)]
    assert len({KEY.derive(*labels).secret for labels in lists} | {KEY.secret}) == len(lists) + 1


def test_keys_come_from_the_operating_system(monkeypatch):
    """Constant seed on the noise: two fresh keys differ, whatever the global seeds are."""
    keys = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        keys.append(SecretKey.generate().secret)
    assert keys[0] != keys[1] and len(keys[0]) == 32
    monkeypatch.setattr("os.urandom", lambda n: b"\7" * n)
    assert SecretKey.generate().secret == b"\7" * 32


def test_streams_leave_the_global_generators_alone():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    KEY.normal(0, 100), KEY.uint64(1, 100), KEY.generator(2), SecretKey.generate()
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_a_key_hides_from_logs():
    assert repr(KEY) == "SecretKey()" and str(KEY) == "SecretKey()"
    assert pickle.loads(pickle.dumps(KEY)) == KEY
    with pytest.raises(ValueError, match="32 bytes, not 16"):
        SecretKey(bytes(16))


@pytest.mark.parametrize("step", [-1, 2**64])
def test_a_step_that_would_wrap_into_another_is_refused(step):
    with pytest.raises(OverflowError):
        KEY.uint64(step, 1)


def test_streams_are_addressed_not_consumed():
    assert np.array_equal(KEY.normal(3, 50), KEY.normal(3, 50))
    assert np.array_equal(KEY.uint64(3, 10), KEY.uint64(3, 50)[:10])  # one more unit changes nobody else's draw
    draws = [KEY.uint64(0, 50), KEY.uint64(1, 50), KEY.derive("a").uint64(0, 50), SecretKey(bytes(32)).uint64(0, 50)]
    assert len(np.unique(np.concatenate(draws))) == 200


def test_uniform_bits():
    """Every one of the 64 bits is fair: 64 two-sided tests at 1e-6 each, false alarm 6e-5 for a random key."""
    bits = np.unpackbits(KEY.uint64(0, 100_000).view(np.uint8)).reshape(-1, 64).sum(0)
    assert all(stats.binomtest(int(b), 100_000).pvalue > 1e-6 for b in bits)


@pytest.mark.parametrize(("scale", "accept"), [(1.0, True), (0.95, False), (1.05, False)])
def test_normal_is_normal_and_5_percent_is_noticed(scale, accept):
    """Kolmogorov-Smirnov at 1e-6; in the middle, and for the largest of two million draws."""
    assert (stats.kstest(KEY.normal(5, 400_000), "norm", args=(0, scale)).pvalue > 1e-6) == accept


def test_normal_has_tails_that_float32_cannot_have():
    """torch's float32 normal_ never exceeds 5.77; of 3e8 draws at 2e-9 per tail, here the largest known uniform."""

    class Smallest(SecretKey):
        def random_bytes(self, step, num_bytes):
            return bytes(num_bytes)

    assert Smallest(bytes(32)).normal(0, 2)[0] > 8.5


@given(st.integers(0, 41))
@settings(max_examples=42)
def test_normal_has_the_size_asked_for(size):
    z = KEY.normal(9, size)
    assert z.shape == (size,) and z.dtype == np.float64 and len(np.unique(z)) == size


def test_pairs_of_normals_are_independent():
    """Cosine and sine halves of one Box-Muller draw, and neighbours: |correlation| of 1e6 pairs under 5 / sqrt(n)."""
    z = KEY.normal(7, 2_000_000)
    halves = z.reshape(2, -1)
    for a, b in (halves, np.square(halves), (z[:-1], z[1:]), (KEY.normal(8, 1_000_000), halves[0])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(len(a))


def test_radii_do_not_lie_on_a_lattice():
    """2^53 times the uniform behind a radius, where float64 resolves it to 0.02, must not always be a whole number."""
    halves = KEY.normal(0, 2_000_000).reshape(2, -1)
    uniform = np.exp(-np.square(halves).sum(0) / 2)
    scaled = uniform[uniform < 1e-3] * 2.0**53
    distance = np.abs(scaled - np.rint(scaled))
    assert stats.kstest(distance, "uniform", args=(0, 0.5)).pvalue > 1e-6


def test_generators_of_steps_are_independent_and_repeat():
    first = [KEY.generator(step).standard_normal(1000) for step in range(3)]
    assert np.array_equal(KEY.generator(1).standard_normal(1000), first[1])
    assert all(abs(np.corrcoef(first)[i, j]) < 5 / 1000**0.5 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not np.array_equal(SecretKey.generate().generator(1).standard_normal(1000), first[1])
