"""Randomness: one secret key, many independent streams.

Everything that protects somebody (noise, Poisson draws) comes from AES-256 in counter mode under a key of the operating
system. Streams are addressed by (labels, step), not consumed in order, so a resumed run needs no saved generator state.
Keys are never logged, saved with an artifact, or put into a config.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

KEY_BYTES = 32


@dataclass(frozen=True)
class SecretKey:
    """A 256-bit secret from which the streams of one release are derived.

    Args:
        secret: 32 bytes. Hidden from ``repr`` so that it cannot slip into a log.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise ValueError(f"a SecretKey holds {KEY_BYTES} bytes, not {len(self.secret)}")

    @staticmethod
    def generate() -> SecretKey:
        """A fresh key from the operating system."""
        return SecretKey(os.urandom(KEY_BYTES))

    def derive(self, *labels: str) -> SecretKey:
        """An independent key for the labels (HKDF-SHA256, RFC 5869).

        Args:
            labels: What the key is for, for example a stage name and a binding digest.

        Returns:
            The derived key; equal labels give an equal key.
        """
        info = b"".join(len(label.encode()).to_bytes(4, "big") + label.encode() for label in labels)
        return SecretKey(HKDF(SHA256(), KEY_BYTES, salt=None, info=b"dpldm/1" + info).derive(self.secret))

    def random_bytes(self, step: int, num_bytes: int) -> bytes:
        """Bytes of the AES-256-CTR key stream of one step.

        Args:
            step: Non-negative index below 2^63; each step has its own 2^64 blocks of 16 bytes.
            num_bytes: How many bytes.
        """
        counter = step.to_bytes(8, "big") + bytes(8)
        encryptor = Cipher(algorithms.AES(self.secret), modes.CTR(counter)).encryptor()
        return encryptor.update(bytes(num_bytes))

    def uint64(self, step: int, size: int) -> np.ndarray:
        """Uniform 64-bit integers, shape [size]."""
        return np.frombuffer(self.random_bytes(step, 8 * size), dtype=np.uint64)

    def normal(self, step: int, size: int) -> np.ndarray:
        """Standard normal float64 draws by Box and Muller (1958), shape [size].

        The radius comes from 128 uniform bits, so it lies on no lattice and tails reach 13 standard deviations.
        """
        half = (size + 1) // 2
        words = self.uint64(step, 3 * half).reshape(3, half)
        uniform = words[0] * 2.0**-64 + (words[1] + 0.5) * 2.0**-128
        radius = np.sqrt(-2.0 * np.log(uniform))
        angle = (words[2] >> np.uint64(11)) * (2.0 * np.pi * 2.0**-53)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:size]

    def generator(self, step: int) -> np.random.Generator:
        """A fast generator for the many draws of one step that must stay secret but need no exact distribution.

        Diffusion times and noises are such draws: rows of a batch shift when a unit is removed, so the sensitivity is C
        only because nobody knows which row got which draw. Philox (Salmon et al. 2011) takes a 128-bit key.
        """
        return np.random.Generator(np.random.Philox(key=self.uint64(step, 2)))
